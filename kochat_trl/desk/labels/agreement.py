"""How far people agree, with one another and with a reward model, on the same answers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from kochat_trl.desk.evaluation.metrics import Figures, accuracy_of
from kochat_trl.desk.labels.items import Item, Scores
from kochat_trl.desk.labels.journal import Judgement

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Dispute:
    """Two answers of which two people prefer different ones: who prefers which."""

    item: Item
    prefers: Mapping[str, str]  # annotator → answer


@dataclass(frozen=True)
class Agreement:
    """`people` has the figures of each two annotators, and `all` those of all of them taken together; `model` those of
    a reward model against each annotator, of the items that were picked in one way: "" if it says nothing of the
    model's scores, "uncertain" where these were near each other, "talk" where the annotator asked. Those of "uncertain"
    are lower than in the data at large, which is what they were picked for.

    Figures are those of `accuracy_of` (`accuracy` is the share of pairs on which both prefer the same answer, `pairs`
    how many pairs that is of, `interval` its 95 % interval), where there are pairs, and `tied`, the pairs left out
    since one of the two says that both answers are as good.
    """

    items: int  # that two people or more ranked
    all: Figures
    people: dict[tuple[str, str], Figures]
    alpha: float | None  # Krippendorff's, ordinal; None where it can't be told
    alpha_interval: tuple[float, float] | None
    model: dict[tuple[str, str], Figures]
    disputes: list[Dispute]


def agreement(judgements: Iterable[Judgement], scores: Scores | None = None, seed: int = 0) -> Agreement:
    """The agreement of the judgements that rank; each is its annotator's only one of its item.

    `scores` has a reward model's of every item that is ranked.
    """
    ranked: dict[str, dict[str, Judgement]] = defaultdict(dict)  # item → annotator → what is said
    for judgement in judgements:
        if judgement.tiers is not None:
            ranked[judgement.item.id][judgement.annotator] = judgement
    people: dict[tuple[str, str], list[_Pair]] = defaultdict(list)
    model: dict[tuple[str, str], list[_Pair]] = defaultdict(list)
    disputes = []
    units = []
    for item_id, its in ranked.items():
        ranks = {name: mid_ranks(its[name]) for name in sorted(its)}
        for one, other in combinations(ranks, 2):
            compared = _compare(item_id, ranks[one], ranks[other])
            people[one, other] += compared
            for pair in compared:
                if pair.won == 0:
                    prefers = {name: min(pair.answers, key=ranks[name].__getitem__) for name in (one, other)}
                    disputes.append(Dispute(its[one].item, prefers))
        if len(ranks) > 1:
            units.append([[own[answer] for own in ranks.values()] for answer in next(iter(ranks.values()))])
        if scores is not None:
            by_score = {answer: -score for answer, score in scores[item_id].items()}
            picked = {judgement.picked for judgement in its.values()}
            how = next((how for how in ("uncertain", "talk") if how in picked), "")
            for name, own in ranks.items():
                model[name, how] += _compare(item_id, own, by_score)
    alpha, interval = _alpha_over_items(units, seed)
    return Agreement(
        len(units),
        _figures([pair for pairs in people.values() for pair in pairs]),
        {names: _figures(pairs) for names, pairs in sorted(people.items())},
        alpha,
        interval,
        {names: _figures(pairs) for names, pairs in sorted(model.items())},
        disputes,
    )


def mid_ranks(judgement: Judgement) -> dict[str, float]:
    """Answer → its rank, 1 for the best; tied answers share the mean of the ranks that they take up."""
    found: dict[str, float] = {}
    for tier in judgement.tiers or ():
        rank = len(found) + (len(tier) + 1) / 2
        found |= {judgement.item.answers[i]: rank for i in tier}
    return found


@dataclass(frozen=True)
class _Pair:
    item: str
    answers: tuple[str, str]
    won: float | None  # 1 if both prefer the same, 0 if not, None if one of the two prefers none


def _compare(item: str, one: Mapping[str, float], other: Mapping[str, float]) -> list[_Pair]:
    """Every two answers to an item under two rankings, in which less is better."""
    found = []
    for a, b in combinations(sorted(one), 2):
        sides = (one[a] - one[b]) * (other[a] - other[b])
        found.append(_Pair(item, (a, b), None if sides == 0 else float(sides > 0)))
    return found


def _figures(pairs: Sequence[_Pair]) -> Figures:
    told = [(pair.won, pair.item) for pair in pairs if pair.won is not None]
    found: dict[str, Any] = {"pairs": len(told), "tied": len(pairs) - len(told)}
    return accuracy_of(*zip(*told, strict=True)) | found if told else found


# --- Krippendorff's alpha -------------------------------------------------------------------------


def coincidences(units: Iterable[Sequence[float]], values: Sequence[float]) -> np.ndarray:
    """The (v, v) coincidence matrix of units, each with the values that it was given by those who judged it.

    o_ck = Σ_u (how many ordered pairs of unit u's values are c, k) / (m_u − 1), m_u the number of its values; a unit
    with one value adds nothing. Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), C.
    """
    place = {value: i for i, value in enumerate(values)}
    found = np.zeros((len(values), len(values)))
    for unit in units:
        if len(unit) > 1:
            counts = np.bincount([place[value] for value in unit], minlength=len(values))
            found += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    return found


def ordinal_alpha(matrix: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha of (…, v, v) coincidences, the values in their order: (…), NaN where all values are one.

    α = 1 − (n − 1) Σ_{c<k} o_ck δ²_ck / Σ_{c<k} n_c n_k δ²_ck, n_c the row sums, n their sum, and for ordinal data
    δ_ck = Σ_{g=c}^{k} n_g − (n_c + n_k)/2. Source: as above, D and its table of metric differences.
    """
    counts = matrix.sum(-1)
    middles = counts.cumsum(-1) - counts / 2
    squares = (middles[..., :, None] - middles[..., None, :]) ** 2
    observed = (matrix * squares).sum((-2, -1))
    expected = (counts[..., :, None] * counts[..., None, :] * squares).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (counts.sum(-1) - 1) * observed / expected, np.nan)


def _alpha_over_items(
    items: Sequence[Sequence[Sequence[float]]], seed: int
) -> tuple[float | None, tuple[float, float] | None]:
    """Alpha of the answers' ranks, an answer a unit, and its 95 % interval: the percentiles of resampled items, since
    the ranks of an item hang together. Without an interval where there is one item, or alpha can't be told.

    A rank says as much in every item only where these have as many answers.
    """
    values = sorted({value for units in items for unit in units for value in unit})
    if not values:
        return None, None
    each = np.stack([coincidences(units, values) for units in items])
    alpha = float(ordinal_alpha(each.sum(0)))
    if np.isnan(alpha):
        return None, None
    if len(items) == 1:
        return alpha, None
    times = np.random.default_rng(seed).multinomial(len(items), [1 / len(items)] * len(items), size=RESAMPLES)
    low, high = np.nanquantile(ordinal_alpha(np.tensordot(times, each, 1)), (0.025, 0.975))
    return alpha, (float(low), float(high))
