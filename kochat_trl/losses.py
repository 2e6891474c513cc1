"""Losses of the reward model, written out. Pure functions of torch tensors."""

import torch
from torch import Tensor


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Mean Bradley–Terry loss −log σ(r_chosen − r_rejected − margin).

    With d = r_chosen − r_rejected − margin, −log σ(d) = log(1 + e^−d) = logaddexp(−d, 0), which is finite with a
    finite gradient for every finite d. Written naively, −log(sigmoid(d)) is inf in float32 from d = −89 down.

    Args:
        chosen: scores of the better completions, shape (pairs,), any float dtype.
        rejected: scores of the worse completions, shape (pairs,).
        margin: by how much `chosen` should win, shape (pairs,), in units of the score.

    Returns:
        A scalar in nats, equal to the loss of TRL's RewardTrainer. Sources: InstructGPT (arXiv:2203.02155, equation
        1); Llama 2 for the margin (arXiv:2307.09288, equation 2).
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return torch.logaddexp(-difference, torch.zeros_like(difference)).mean()
