"""Losses of the reward model, written out. Pure functions of torch tensors.

Scores may have any float dtype. The loss is float32, or float64 where the scores are; nothing is computed in float16 or
bfloat16. Ranks are integers, 0 for the best, equal for a tie. −1 (any negative rank) marks a slot that takes no part: a
completion that was not ranked, or padding. It may hold anything, NaN included, and its gradient is 0.
"""

from itertools import combinations

from kochat_trl.data.rankings import Pairs

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Mean over pairs of the Bradley–Terry loss −log σ(r_chosen − r_rejected − margin).

    `logsigmoid` is finite for every finite difference. Written naively, log(sigmoid(d)) is −inf in float32 from
    d = −89 down, and its gradient NaN.

    Args:
        chosen: scores of the better completions, shape (pairs,).
        rejected: scores of the worse completions, shape (pairs,).
        margin: by how much `chosen` should win, shape (pairs,), in units of the score.
        center_coefficient: adds this times (r_chosen + r_rejected)², which holds the mean score near 0, to each pair.

    Returns:
        A scalar in nats, equal to the loss of TRL's RewardTrainer; 0 if there is no pair. Sources: arXiv:2203.02155,
        equation 1; arXiv:2307.09288, equation 2, for the margin; arXiv:2312.09244, equation 2, for the centring.

    Raises `ValueError` if the shapes differ: (pairs,) and (pairs, 1) would broadcast to all against all.
    """
    losses = _pair_losses(chosen, rejected, margin, center_coefficient)
    return losses.sum() / max(losses.numel(), 1)


def all_pairs_loss(
    scores: Tensor, ranks: Tensor, margin_per_rank: float = 0.0, center_coefficient: float = 0.0, pairs: Pairs = "all"
) -> Tensor:
    """InstructGPT's loss: the mean over a prompt's (better, worse) pairs, then the mean over prompts.

    Every prompt weighs the same, however many completions it has. For the plain mean over all pairs, give
    `pairwise_loss` the pairs of `group_pairs`.

    Args:
        scores: shape (prompts, k).
        ranks: shape (prompts, k), best 0, ties equal, −1 for no part. A tie gives no pair.
        margin_per_rank: the margin of a pair is this times the difference of its ranks.
        center_coefficient: as in `pairwise_loss`.
        pairs: as in `group_pairs`.

    Returns:
        A scalar in nats. Prompts without a pair are left out of the mean; 0 if none is left. Source: InstructGPT
        (arXiv:2203.02155), equation 1, with the number of pairs for (k choose 2).

    Raises `ValueError` if the shapes differ or `ranks` are not integers.
    """
    _check(scores, ranks)
    scores = _widen(scores)
    row, better, worse = group_pairs(ranks, pairs)
    margin = margin_per_rank * (ranks[row, worse] - ranks[row, better]).to(scores.dtype)
    losses = _pair_losses(scores[row, better], scores[row, worse], margin, center_coefficient)
    count = row.bincount(minlength=len(ranks))
    return (losses / count[row]).sum() / (count > 0).sum().clamp(min=1)


def group_pairs(ranks: Tensor, pairs: Pairs = "all") -> tuple[Tensor, Tensor, Tensor]:
    """Indices `(row, better, worse)`, each (pairs,), of the pairs that `ranks`, (prompts, k), tells apart.

    The pairs' scores are `scores[row, better]` and `scores[row, worse]`. Ties and −1 give no pair. `pairs` is as in
    `rankings.tier_pairs`, and takes ranks without gaps: 0, 1, 2, …
    """
    first, second = ranks.unsqueeze(2), ranks.unsqueeze(1)
    told_apart = (first >= 0) & (first < second)
    if pairs == "best_vs_rest":
        told_apart &= first == 0
    elif pairs == "adjacent":
        told_apart &= second == first + 1
    row, better, worse = told_apart.nonzero(as_tuple=True)
    return row, better, worse


def listwise_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Mean over prompts of −log P(ranking) under Plackett–Luce.

    Plackett–Luce draws the best completion from softmax(scores), then the best of those left, and so on to the last.
    Two completions make it Bradley–Terry, and the loss `pairwise_loss`.

    A tie says that the order of the tied is unknown: P is the exact sum over all orders that agree with the ranks. That
    takes 2^m steps for m tied completions, and none if they are the last. So ranks 0, 1, 1, 1 give softmax
    cross-entropy. Completions tied last are worse than the others; unranked ones are compared with none.

    Args:
        scores: shape (prompts, k).
        ranks: shape (prompts, k), best 0, ties equal, −1 for no part. Only their order counts.

    Returns:
        A scalar in nats. Prompts without two different ranks say nothing (P = 1) and are left out of the mean; 0 if
        none is left. Sources: ListMLE (Xia et al. 2008); for ties, the marginal likelihood of Kalbfleisch and Prentice
        (Biometrika 60, 1973), whose model of survival times is Plackett–Luce.

    Raises `ValueError` if the shapes differ or `ranks` are not integers.
    """
    _check(scores, ranks)
    exact = scores.double()  # the orders of a tie may differ by little in logarithms of −10⁴
    total, prompts = exact[:0].sum(), 0  # a sum of nothing is 0, and part of the graph
    for row, rank in zip(exact, ranks, strict=True):
        tiers = [row[rank == value] for value in rank[rank >= 0].unique()]  # best first
        for i, tier in enumerate(tiers[:-1]):
            total = total - _log_all_first(tier, torch.cat(tiers[i + 1 :]))
        prompts += len(tiers) > 1
    return (total / max(prompts, 1)).to(_widen(scores).dtype)


def _log_all_first(tied: Tensor, rest: Tensor) -> Tensor:
    """log P(all of `tied`, (m,), are drawn before any of `rest`, (n,)), in whatever order."""
    log_p: dict[tuple[int, ...], Tensor] = {(): tied.new_zeros(())}  # the same for each subset of `tied`
    for size in range(1, len(tied) + 1):
        for left in combinations(range(len(tied)), size):
            orders = []
            for i in left:
                later = tuple(j for j in left if j != i)
                others = torch.cat([tied[list(later)], rest])
                log_drawn_next = F.logsigmoid(-(others - tied[i]).logsumexp(0))  # i against all others at once
                orders.append(log_drawn_next + log_p[later])
            log_p[left] = torch.stack(orders).logsumexp(0)
    return log_p[left]


def _pair_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coefficient: float) -> Tensor:
    """The loss of each pair, (pairs,), as `pairwise_loss` says."""
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        raise ValueError("chosen, rejected and margin must have the same shape")
    chosen, rejected = _widen(chosen), _widen(rejected)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -F.logsigmoid(difference)
    return losses + center_coefficient * (chosen + rejected) ** 2 if center_coefficient else losses


def _widen(scores: Tensor) -> Tensor:
    """At least float32: at scores of 1e4 the square overflows float16, and a margin of 1 is lost in both halves."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _check(scores: Tensor, ranks: Tensor) -> None:
    if scores.dim() != 2 or scores.shape != ranks.shape or ranks.is_floating_point():
        found = f"{tuple(scores.shape)} and {tuple(ranks.shape)}, {ranks.dtype}"
        raise ValueError(f"scores and integer ranks must both be (prompts, k); found {found}")
