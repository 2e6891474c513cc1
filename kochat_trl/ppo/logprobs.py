"""log-probabilities of tokens from hidden states, without ever holding a row of vocabulary scores for each token.

64 responses of 128 tokens over kogpt2's 51,200 words are 1.7 GB of scores in float32, and softmax and its gradient
take as much again. Here the head runs on a few tokens at a time and keeps one number, or one hidden vector, for each.
"""

from typing import Any

from kochat_trl.models.heads import LMHead
from kochat_trl.models.linear import linear
from kochat_trl.ppo.objective import entropy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # tokens; 26 MB of scores for kogpt2


def token_logprobs(head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / temperature) at `tokens`, and the entropy of the same distribution, without gradient.

    `hidden` is (n, hidden_size), `tokens` (n,); both results are (n,), in float32, or float64 for a float64 head.
    """
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
    frozen = type(head.linear) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    if frozen or not torch.is_grad_enabled():
        parts = [
            _FrozenHead.apply(head, h, t, temperature)
            for h, t in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
        ]
    else:  # the head learns too: its logits are computed again in the backward pass
        parts = [
            checkpoint(_logprobs, head, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
        ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs(head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits if temperature == 1 else logits / temperature
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    return chosen - logits.logsumexp(1), entropy(logits.detach())


class _FrozenHead(torch.autograd.Function):
    """A frozen head passes back one vector for each token, ∂ log p(a)/∂h = Σ_v (1[v = a] − p_v) z'_v w_v / temperature.

    z are the logits of the head's own scores Wh, and z' is the head's factor, times 1 − (z / cap)² under a soft cap.
    So it is computed on the way forward, while the logits are there, and the logits are dropped.
    """

    @staticmethod
    def forward(ctx: Any, head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        # Few tensors of this size, each used again: on a CPU fresh memory takes longer than the arithmetic.
        logits = head(hidden)
        slope = 1 - (logits / head.cap).square() if head.cap is not None and ctx.needs_input_grad[1] else None
        if temperature != 1:
            logits /= temperature
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, tokens[:, None])
        probabilities = logits.exp()
        total = probabilities.sum(1, keepdim=True)
        entropies = total.log() - logits.mul_(probabilities).sum(1, keepdim=True) / total
        if ctx.needs_input_grad[1]:
            # The difference is taken among probabilities, in full precision: among word vectors it would be rounding
            # error wherever the policy is sure.
            residual = probabilities.div_(-total).scatter_add_(1, tokens[:, None], torch.ones_like(total))
            if slope is not None:
                residual *= slope
            weight: Any = head.linear.weight
            through = linear(residual.to(weight.dtype), weight.T)
            ctx.save_for_backward(through.to(logits.dtype) / (temperature / head.factor))
            ctx.dtype = hidden.dtype
        entropies = entropies.squeeze(1)
        ctx.mark_non_differentiable(entropies)
        return (chosen - total.log()).squeeze(1), entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
        (jacobian,) = ctx.saved_tensors
        return None, (grad[:, None] * jacobian).to(ctx.dtype), None, None
