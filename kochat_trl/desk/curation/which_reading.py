"""Which of the two readings of a ranking the answers themselves support."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kochat_trl.data.rankings import ranking_tiers, readings_differ, tier_pairs
from kochat_trl.data.text import has_hangul
from kochat_trl.desk.statistics import sign_test


@dataclass
class Reading:
    """Which reading of a file's rankings the answers themselves support, as `judge_reading` tells it."""

    rankings: dict[str, int]  # as written, such as "[2, 0, 1]" → records
    pairs: dict[str, dict[str, int]]  # sign → reading → pairs in its favour, of those that the readings disagree on
    decided_by: str  # a sign, or `TOGETHER`
    votes: dict[str, int]  # reading → records in its favour, by that sign
    p: float
    verdict: Literal["best_first", "rank_of", "can't be told"]


def _distinct_share(text: str) -> float:
    words = text.split()
    return len(set(words)) / max(len(words), 1)


HANGUL, TOGETHER = "has Hangul", "all signs together"
SIGNS: dict[str, Callable[[str], float]] = {
    HANGUL: has_hangul,
    "is longer": len,
    "repeats itself less": _distinct_share,
}
ALPHA = 0.01
ENOUGH = 8  # votes: with fewer, p is over ALPHA even where all agree


def judge_reading(rankings: Sequence[tuple[Any, Sequence[str]]]) -> Reading:
    """Which reading of `(ranking, completions)` the answers support, by signs of quality that a program can see.

    Only pairs that the two readings turn round can tell. Of each such pair and each of `SIGNS`, the answer that shows
    the sign more should be the better one; where both show it alike, the pair says nothing. The pairs of one record
    have answers in common (the two of a 3-cycle share one), so they are no independent witnesses: a record has one
    vote, as most of its pairs say. Hangul decides, the surest sign, if it gives `ENOUGH` votes; else all signs do, by
    the records of which two signs more say one thing than the other: no other sign is to be trusted alone, since
    some data prefers short answers, and long ones repeat themselves more. Which of the two decides hangs on how many
    votes there are, not on what they say, so that one two-sided sign test at `ALPHA` is fair: if a sign had nothing
    to do with the ranking, the votes would be coin tosses.
    """
    pairs = {sign: {"best_first": 0, "rank_of": 0} for sign in SIGNS}
    votes = {sign: {"best_first": 0, "rank_of": 0} for sign in (*SIGNS, TOGETHER)}

    def count(tally: dict[str, int], lean: float) -> int:
        """Count for best_first if `lean` is positive, for rank_of if it is negative; return +1, −1 or 0."""
        if lean:
            tally["best_first" if lean > 0 else "rank_of"] += 1
        return (lean > 0) - (lean < 0)

    for ranking, completions in rankings:
        turned = [(completions[i], completions[j]) for i, j in disputed(ranking, len(completions))]
        lean = 0
        for sign, shows in SIGNS.items():
            by_pair = [count(pairs[sign], shows(better) - shows(worse)) for better, worse in turned]
            lean += count(votes[sign], sum(by_pair))
        count(votes[TOGETHER], lean if abs(lean) > 1 else 0)
    decided_by = HANGUL if sum(votes[HANGUL].values()) >= ENOUGH else TOGETHER
    best_first, rank_of = votes[decided_by].values()
    p = sign_test(best_first, rank_of)
    verdict: Any = "can't be told" if p >= ALPHA else "best_first" if best_first > rank_of else "rank_of"
    counts = Counter(str(ranking) for ranking, _ in rankings)
    return Reading(dict(counts.most_common()), pairs, decided_by, votes[decided_by], p, verdict)


def disputed(ranking: Any, count: int) -> list[tuple[int, int]]:
    """The pairs (i, j) where best_first prefers i and rank_of prefers j; only a permutation of all `count` has any."""
    if not all(isinstance(i, int) for i in ranking) or sorted(ranking) != list(range(count)):
        return []
    if not readings_differ(ranking):
        return []
    first, second = (
        {(pair.better, pair.worse) for pair in tier_pairs(ranking_tiers(ranking, count, order))}
        for order in ("best_first", "rank_of")
    )
    return sorted(pair for pair in first if pair[::-1] in second)
