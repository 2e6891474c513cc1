"""A ranking of k completions → (better, worse) pairs.

KoChatGPT's `ranking` is a **best-first** list of completion indices: `[2, 0, 1]` says that completion 2 is the
best and completion 1 the worst. KoChatGPT's own trainer reads it as "rank of completion i" instead, which
turns 4 of the 18 pairs over the six permutations of three upside down (docs/data.md has the table).
"""

import re
from itertools import combinations, permutations
from typing import Any, Literal, NamedTuple

RankingOrder = Literal["best_first", "rank_of"]
Pairs = Literal["all", "best_vs_rest", "adjacent"]
Tiers = tuple[tuple[int, ...], ...]  # completion indices, best tier first; those of one tier are tied


class Pair(NamedTuple):
    """Indices of two completions, and how many tiers the worse one stands below the better one (≥ 1)."""

    better: int
    worse: int
    distance: int


def ranking_tiers(ranking: Any, count: int, order: RankingOrder = "best_first") -> Tiers:
    """The tiers of `count` completions under one reading of `ranking`.

    `best_first`: `ranking` lists completion indices, best first; a list inside it is a tie, and a completion that it
    doesn't name is not ranked: `[2, [0, 1]]`. `rank_of`: `ranking[i]` is the rank of completion i, least is best;
    equal ranks are a tie, and null is not ranked: `[1, 1, 0]` says the same.

    Raises `ValueError`, with what was expected, if `ranking` isn't one of `count` completions.
    """
    if order == "rank_of":
        if (
            not isinstance(ranking, list)
            or len(ranking) != count
            or not all(r is None or _is_index(r) for r in ranking)
        ):
            raise ValueError(f"the rank of each of the {count} completions: {count} whole numbers or nulls")
        ranks = sorted({rank for rank in ranking if rank is not None})
        return tuple(tuple(i for i in range(count) if ranking[i] == rank) for rank in ranks)
    tiers = [tier if isinstance(tier, list) else [tier] for tier in ranking] if isinstance(ranking, list) else [[]]
    named = [index for tier in tiers for index in tier]
    are_indices = all([_is_index(index) and 0 <= index < count for index in named])
    if not all(tiers) or not are_indices or len(set(named)) < len(named):
        raise ValueError(f"indices from 0 to {count - 1}, best first, none twice; a list inside is a tie")
    return tuple(map(tuple, tiers))


def counted_from_0(ranking: Any, count: int) -> tuple[Any, int | None]:
    """`ranking` as numbers from 0, and what it counts from: 0, 1, or None where its numbers can't tell.

    It may be a text, "2,1,0" or "2 > 1 > 0", or have its numbers as texts or as floats. It counts from 1 if it names
    all of 1 … `count`, and from 0 if it names 0.
    """
    if isinstance(ranking, list) and 0 in ranking and not any([isinstance(i, float) for i in ranking]):
        return ranking, 0
    if isinstance(ranking, str):
        listed = ranking.strip().strip("[]()")
        parts = [part.strip() for part in re.split("[,>]", listed)] if re.search("[,>]", listed) else listed.split()
        if len(parts) > 1 and all(map(str.isdecimal, parts)):
            ranking = parts
    if not isinstance(ranking, list):
        return ranking, None
    numbers = [[*map(as_number, tier)] if isinstance(tier, list) else as_number(tier) for tier in ranking]
    named = [i for tier in numbers for i in (tier if isinstance(tier, list) else [tier])]
    if not all(map(_is_index, named)):
        return numbers, None
    if sorted(named) != list(range(1, count + 1)):
        return numbers, 0 if 0 in named else None
    return [[i - 1 for i in tier] if isinstance(tier, list) else tier - 1 for tier in numbers], 1


def tier_pairs(tiers: Tiers, pairs: Pairs = "all") -> list[Pair]:
    """The pairs that `tiers` gives, best first; tied completions give none.

    `all`: every two completions of different tiers, k·(k−1)/2 without ties. `best_vs_rest`: the best tier against
    each other one. `adjacent`: each tier against the next.
    """
    found = []
    for above, below in combinations(range(len(tiers)), 2):
        if pairs == "all" or (above == 0 if pairs == "best_vs_rest" else below == above + 1):
            found += [Pair(better, worse, below - above) for better in tiers[above] for worse in tiers[below]]
    return found


def disputed(ranking: list[Any], count: int) -> list[tuple[int, int]]:
    """The pairs (i, j) where best_first prefers i and rank_of prefers j; only a permutation of all `count` has any.

    Of the six permutations of three these are the 3-cycles, [1, 2, 0] and [2, 0, 1], with two such pairs each.
    """
    if not all(map(_is_index, ranking)) or sorted(ranking) != list(range(count)):
        return []
    place = ranking.index
    return [(i, j) for i, j in permutations(range(count), 2) if place(i) < place(j) and ranking[i] > ranking[j]]


def as_number(value: Any) -> Any:
    """A number that is a text, as in a table, where a blank is none, or a whole one that came as a float."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value if value.strip() else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_index(value: Any) -> bool:
    return type(value) is int  # and no bool
