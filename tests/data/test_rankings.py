"""What must hold for every ranking: the pairs it gives, against brute force, and what is refused."""

import itertools

from kochat_trl.data.rankings import disputed, ranking_tiers, tier_pairs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def weak_orders(count: int) -> list[tuple[int, ...]]:
    """All ways to rank `count` things with ties: the rank of each, from 0, none left out."""
    return [
        ranks for ranks in itertools.product(range(count), repeat=count) if set(ranks) == set(range(max(ranks) + 1))
    ]


def partial_orders(count: int) -> list[tuple[int | None, ...]]:
    """All ways to rank some or none of `count` things with ties; None is not ranked."""
    orders = []
    for named in itertools.product([True, False], repeat=count):
        for ranks in weak_orders(sum(named)) if any(named) else [()]:
            rest = iter(ranks)
            orders.append(tuple(next(rest) if is_named else None for is_named in named))
    return orders


def pairs_by_brute_force(ranks: tuple[int | None, ...], mode: str) -> set[tuple[int, int, int]]:
    """(better, worse, distance) of any two that are ranked apart: what `pairs` asks of the two, and nothing clever."""
    found = set()
    for better, worse in itertools.permutations(range(len(ranks)), 2):
        above, below = ranks[better], ranks[worse]
        if above is None or below is None or above >= below:
            continue
        if mode == "all" or (mode == "best_vs_rest" and above == 0) or (mode == "adjacent" and below - above == 1):
            found.add((better, worse, below - above))
    return found


def best_first(ranks: tuple[int | None, ...]) -> list:
    tiers = [[i for i, rank in enumerate(ranks) if rank == tier] for tier in range(len(set(ranks) - {None}))]
    return [tier if len(tier) > 1 else tier[0] for tier in tiers]


def rank_of(ranks: tuple[int | None, ...]) -> list:
    """Ranks need not be 0, 1, 2: only their order counts."""
    return [None if rank is None else 7 * rank - 10 for rank in ranks]


ORDERS = {
    **{f"{k} ranked": weak_orders(k) for k in range(1, 7)},
    **{f"{k}, some ranked": partial_orders(k) for k in range(1, 6)},
}


def test_every_weak_order_is_tried():
    """The ordered Bell numbers, and for partial rankings their sum over all subsets."""
    assert [len(orders) for orders in ORDERS.values()] == [1, 3, 13, 75, 541, 4683, 2, 6, 26, 150, 1082]
    assert all(set(itertools.permutations(range(k))) <= set(ORDERS[f"{k} ranked"]) for k in range(1, 7))


@pytest.mark.parametrize("mode", ["all", "best_vs_rest", "adjacent"])
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_pairs_of_every_ranking(orders, mode):
    for ranks in orders:
        expected = pairs_by_brute_force(ranks, mode)
        readings = [
            tier_pairs(ranking_tiers(best_first(ranks), len(ranks), "best_first"), mode),
            tier_pairs(ranking_tiers(rank_of(ranks), len(ranks), "rank_of"), mode),
        ]
        for pairs in readings:
            assert len(pairs) == len(set(pairs))
            assert set(pairs) == expected, ranks
            assert not {(b, a) for a, b, _ in pairs} & {(a, b) for a, b, _ in pairs}
            assert [ranks[better] for better, _, _ in pairs] == sorted(ranks[better] for better, _, _ in pairs)
        assert readings[0] == readings[1]


@pytest.mark.parametrize("count", range(2, 7))
def test_a_full_ranking_gives_every_pair_once(count):
    for order in itertools.permutations(range(count)):
        pairs = tier_pairs(ranking_tiers(list(order), count), "all")
        assert [(a, b) for a, b, _ in pairs] == list(itertools.combinations(order, 2))
        assert len(tier_pairs(ranking_tiers(list(order), count), "best_vs_rest")) == count - 1
        assert len(tier_pairs(ranking_tiers(list(order), count), "adjacent")) == count - 1
        other_reading = tier_pairs(ranking_tiers(list(order), count, "rank_of"), "all")
        upside_down = {(a, b) for a, b, _ in pairs} & {(b, a) for a, b, _ in other_reading}
        assert disputed(list(order), count) == sorted(upside_down)


def test_the_other_reading_turns_4_of_18_pairs_upside_down():
    """KoChatGPT's trainer against KoChatGPT's builder, over the six permutations of three."""
    turned = {}
    for order in itertools.permutations(range(3)):
        ours, theirs = (
            {(a, b) for a, b, _ in tier_pairs(ranking_tiers(list(order), 3, reading))}
            for reading in ("best_first", "rank_of")
        )
        assert len(ours) == len(theirs) == 3
        turned[order] = len(ours & {(b, a) for a, b in theirs})
        assert len(disputed(list(order), 3)) == turned[order]
    assert {order: count for order, count in turned.items() if count} == {(1, 2, 0): 2, (2, 0, 1): 2}


def test_only_a_permutation_of_all_completions_has_pairs_that_the_readings_dispute():
    assert disputed([1, 2, 0], 3) == [(1, 0), (1, 2)]
    for ranking in ([1, 2], [1, [2, 0]], [1, None, 0], [1, 1, 0], [3, 1, 2]):
        assert disputed(ranking, 3) == []


INDICES = st.integers(-1, 3) | st.none()
RANKINGS = st.lists(INDICES | st.lists(INDICES, max_size=2), max_size=4) | st.recursive(
    INDICES | st.booleans() | st.text(max_size=2) | st.floats(0, 3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=1), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(ranking=RANKINGS, count=st.integers(2, 4))
def test_anything_else_is_refused(ranking, count):
    def is_index(value):
        return type(value) is int and value in range(count)

    listed = ranking if isinstance(ranking, list) else []
    named = [index for tier in listed for index in (tier if isinstance(tier, list) else [tier])]
    is_ranking = {
        "best_first": all(map(is_index, named)) and len(set(named)) == len(named) and [] not in listed,
        "rank_of": len(listed) == count and all(rank is None or type(rank) is int for rank in listed),
    }
    for order, expected in is_ranking.items():
        if expected and isinstance(ranking, list):
            assert sorted(sum(ranking_tiers(ranking, count, order), ())) == sorted(
                named if order == "best_first" else (i for i in range(count) if ranking[i] is not None)
            )
        else:
            with pytest.raises(ValueError, match=r"indices from 0 to|the rank of each"):
                ranking_tiers(ranking, count, order)
