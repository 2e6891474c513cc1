"""How good the scores of a reward model are, on rankings that it was not trained on.

A reward model that learned no more than that the longer answer wins, or the one in Korean, can look good: the data that
taught it so is like the data that tests it. Hence both rules stand beside it here, on the same pairs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from kochat_trl.data.text import hangul_share
from kochat_trl.desk.statistics import effective_size, sign_test, wilson_interval

LEVEL = 0.05  # a baseline is beaten where p is below this
BINS = 10  # of confidence
LENGTH_GAPS = ((1, 8), (9, 32), (33, math.inf))  # in tokens


@dataclass(frozen=True)
class ScoredAnswer:
    """One completion of a ranking. `rank` is 0 for the best; `tokens` counts its `</s>` too."""

    text: str
    rank: int
    tokens: int
    score: float


Figures = dict[str, Any]  # as evaluation.json has them
ScoredRanking = tuple[str, list[ScoredAnswer]]  # a prompt, and the answers to it that were ranked
Worth = Callable[[ScoredAnswer], float]  # the answer that is worth more wins
BASELINES: dict[str, Worth] = {
    "longer answer wins": lambda answer: answer.tokens,
    "shorter answer wins": lambda answer: -answer.tokens,
    "more Hangul wins": lambda answer: hangul_share(answer.text),
}


@dataclass(frozen=True)
class ScoredPair:
    """Two answers to `prompt`, of which people prefer the first, from a ranking of `ranks` different ranks."""

    prompt: str
    better: ScoredAnswer
    worse: ScoredAnswer
    ranks: int

    @property
    def margin(self) -> float:
        return self.better.score - self.worse.score


def scored_pairs(rankings: Sequence[ScoredRanking]) -> list[ScoredPair]:
    """Every two answers of different rank to the same prompt, of each ranking in turn."""
    found = []
    for prompt, answers in rankings:
        ranks = len({answer.rank for answer in answers})
        for better in answers:
            found += [ScoredPair(prompt, better, worse, ranks) for worse in answers if better.rank < worse.rank]
    return found


def pair_kind(better: int, worse: int, ranks: int) -> str:
    """The name of a pair by the ranks of its answers, 0 for the best, in a ranking that has `ranks` different ones.

    Of two ranks there is one kind, `pair`; of three, best, middle and worst; of more, ranks are numbered from 1.
    """
    if ranks == 2:
        return "pair"
    if ranks == 3:
        names = ("best", "middle", "worst")
        return f"{names[better]}–{names[worse]}"
    return f"{better + 1}–{worse + 1} of {ranks}"


def gap_kind(tokens: int) -> str:
    """The name of the pairs whose better answer is about `tokens` longer (shorter, if negative)."""
    if tokens == 0:
        return "same length"
    low, high = next(gap for gap in LENGTH_GAPS if abs(tokens) <= gap[1])
    return f"{'longer' if tokens > 0 else 'shorter'} by {f'{low}–{high}' if high < math.inf else f'{low} or more'}"


def wins(pairs: Sequence[ScoredPair], worth: Worth = lambda answer: answer.score) -> list[float]:
    """For each pair 1 if the better answer is worth more, 0 if the worse one is, ½ if both are worth the same."""
    return [_won(worth(pair.better) - worth(pair.worse)) for pair in pairs]


def _won(gap: float) -> float:
    return 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5


def accuracy_of(won: Sequence[float], prompts: Sequence[str]) -> Figures:
    """The accuracy of pairs that were won (1), lost (0) or drawn (½); `prompts` says whose each one is.

    The 95 % interval is Wilson's for as many trials as the pairs are worth (`effective_size`). So it has a width also
    where every pair is right, unlike a bootstrap over prompts. `if_independent` takes every pair for a prompt of its
    own.
    """
    share, size = fmean(won), effective_size(won, prompts)
    intervals = {"interval": wilson_interval(share * size, size), "if_independent": wilson_interval(sum(won), len(won))}
    return {"pairs": len(won), "prompts": len(set(prompts)), "accuracy": share} | intervals


def accuracies(
    pairs: Sequence[ScoredPair], order: Callable[[ScoredPair], Any], name: Callable[[ScoredPair], str]
) -> dict[str, Figures]:
    """The model's accuracy on the pairs of each `name`, which are in that order."""
    parts: dict[str, list[ScoredPair]] = defaultdict(list)
    for pair in sorted(pairs, key=order):
        parts[name(pair)].append(pair)
    return {key: accuracy_of(wins(part), [pair.prompt for pair in part]) for key, part in parts.items()}


def against_baseline(model: Sequence[float], baseline: Sequence[float], prompts: Sequence[str]) -> Figures:
    """Whether the model beats a baseline, by what `wins` says of each on the same pairs.

    The model is ahead on a prompt where it puts more of its pairs right. It beats the baseline if its accuracy is
    higher and it is ahead on more prompts than it is behind on, by an exact two-sided sign test at 5 %. Where every
    prompt has one pair, that is McNemar's exact test, on the pairs where only one of the two is right.
    """
    lead: dict[str, float] = defaultdict(float)
    for prompt, ours, theirs in zip(prompts, model, baseline, strict=True):
        lead[prompt] += ours - theirs
    ahead, behind = (sum(sign * value > 0 for value in lead.values()) for sign in (1, -1))
    p = sign_test(ahead, behind)
    beaten = fmean(model) > fmean(baseline) and ahead > behind and p < LEVEL
    accuracy = accuracy_of(baseline, prompts)
    return {"accuracy": accuracy, "ahead": ahead, "behind": behind, "p": p, "beaten": beaten}


def expected_calibration_error(margins: Sequence[float]) -> Figures:
    """How far the model's confidence in the order of two answers is from how often the order is right: the `error`.

    `margins` has r_better − r_worse of each pair. The model knows two answers, not which is the better one. It puts
    them in an order with the confidence σ(|margin|), from 0.5 to 1, that Bradley–Terry gives it, and is right where the
    margin is above 0 (half right at 0). ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over ten bins of equal width.
    With few pairs it is above 0 for a calibrated model too. `bins` are those that have pairs, from `low` to `high`.
    Source: Guo et al. (arXiv:1706.04599), equation 3.
    """
    members: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        members[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append((confidence, _won(margin)))
    bins = []
    for i in sorted(members):
        confidences, rights = zip(*members[i], strict=True)
        low, high = (0.5 + edge / (2 * BINS) for edge in (i, i + 1))
        means = {"confidence": fmean(confidences), "accuracy": fmean(rights)}
        bins.append({"low": low, "high": high, "pairs": len(rights)} | means)
    return {"error": sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(margins), "bins": bins}


def agreement(one: Sequence[ScoredRanking], other: Sequence[ScoredRanking]) -> Figures:
    """How far two scorings of the same rankings agree: the share of pairs in the same order, and the scores' distance.

    An answer that is in several rankings counts in each.
    """
    pairs = zip(scored_pairs(one), scored_pairs(other), strict=True)
    same = [_won(a.margin) == _won(b.margin) for a, b in pairs]
    scores = ([answer.score for _, answers in rankings for answer in answers] for rankings in (one, other))
    differences = [abs(a - b) for a, b in zip(*scores, strict=True)]
    return {"same_order": fmean(same), "mean_difference": fmean(differences), "max_difference": max(differences)}


def evaluate(rankings: Sequence[ScoredRanking]) -> Figures:
    """All metrics. Pairs of the same prompt are taken together wherever pairs are assumed to be independent."""
    pairs = scored_pairs(rankings)
    prompts = [pair.prompt for pair in pairs]
    won = wins(pairs)
    scores: dict[int, list[float]] = defaultdict(list)
    for answer in (answer for _, answers in rankings for answer in answers):
        scores[answer.rank].append(answer.score)

    def place(pair: ScoredPair) -> tuple[int, int, int]:
        return pair.ranks, pair.worse.rank - pair.better.rank, pair.better.rank

    def longer(pair: ScoredPair) -> int:
        return pair.better.tokens - pair.worse.tokens

    return {
        "answers": len({(prompt, answer.text) for prompt, answers in rankings for answer in answers}),
        "accuracy": accuracy_of(won, prompts),
        "baselines": {name: against_baseline(won, wins(pairs, worth), prompts) for name, worth in BASELINES.items()},
        "by_kind": accuracies(pairs, place, lambda pair: pair_kind(pair.better.rank, pair.worse.rank, pair.ranks)),
        "by_length_gap": accuracies(pairs, longer, lambda pair: gap_kind(longer(pair))),
        "calibration": expected_calibration_error([pair.margin for pair in pairs]),
        "scores_by_rank": {
            rank: {"answers": len(own), "mean": fmean(own), "std": pstdev(own), "min": min(own), "max": max(own)}
            for rank, own in sorted(scores.items())
        },
    }
