"""The mathematics of PPO for language models, as pure functions.

A response is a trajectory: the state is the prompt and the tokens so far, the action is the next token. Tensors are
(b, t) for b responses of at most t tokens, float; a `mask` of that shape is True on the tokens of a response, and what
stands where it is False changes nothing, not even if it is NaN. log-probabilities and KL are in nats.

In the order of the loop:

    log π, log π_ref  →  kl_estimate  →  token_rewards  →  gae  →  whiten  →  policy_losses, value_losses

The group methods answer each prompt several times, and an answer's advantage is over the others': no value function.

    RLOO:  kl_estimate  →  token_rewards  →  rloo_advantages  →  sequence_losses
    GRPO:  the scores alone  →  grpo_advantages  →  grpo_losses, weighted by token_weights

Papers: [PPO] Schulman et al. 2017, 1707.06347. [GAE] Schulman et al. 2015, 1506.02438. [Z] Ziegler et al. 2019,
1909.08593. [KL] Schulman 2020, joschu.net/blog/kl-approx.html. [RLOO] Ahmadian et al. 2024, 2402.14740. [GRPO] Shao et
al. 2024 (DeepSeekMath), 2402.03300. [Dr] Liu et al. 2025 (Dr. GRPO), 2503.20783. [DAPO] Yu et al. 2025, 2503.14476.
[V3.2] DeepSeek-AI 2025, 2512.02556.

The loss of a step is the mean of `policy_losses` plus vf_coef times the mean of `value_losses`; there is no entropy
bonus, and `entropy` is a metric. The defaults are those of TRL 1.12's PPOConfig; of GRPO, of its GRPOConfig.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
LossType = Literal["grpo", "dapo", "dr_grpo"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is True: a scalar."""
    return torch.where(mask, values, 0).sum() / mask.sum()


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """KL(π ‖ π_ref) of each token, estimated from the sampled token alone, (b, t).  [KL]

    The tokens are drawn from π. With d = log π − log π_ref: k1 = d, unbiased; k2 = d²/2, biased, low variance;
    k3 = e^(−d) − 1 + d, unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    return torch.exp(-d) - 1 + d


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient of the next update, after `episodes` responses of mean KL `kl` a response.  [Z] section 2.2

    As in [Z]'s code, a proportional controller: e = clip(kl/target − 1, −0.2, 0.2); β ← β · (1 + e · episodes/horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all numbers seen so far (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        count, mean = values.numel(), values.mean().item()
        shift, total = mean - self.mean, self.count + values.numel()
        self.squares += (values - mean).square().sum().item() + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def normalize(self, values: Tensor) -> Tensor:
        """`values` with the mean and the unbiased standard deviation of all numbers seen; as they are before two."""
        if self.count < 2:
            return values
        return (values - self.mean) / ((self.squares / (self.count - 1)) ** 0.5 + 1e-8)


def final_scores(
    scores: Tensor, ended: Tensor, missing_eos_penalty: float | None = None, clip: float | None = None
) -> Tensor:
    """What the responses earn, (b,): the reward model's `scores`, clipped to ±`clip`, and less the penalty for a
    response that didn't end itself (`ended` is False)."""
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores - (missing_eos_penalty or 0.0) * (~ended).to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, end: Tensor | None = None) -> Tensor:
    """The reward of each token, (b, t): −kl_coef · kl, and the score (b,) on top at the last one.  [Z] eq. 2

    `end` (b,) is the column of the score. By default it is the last token of the response, which is `</s>` where the
    response ended; TRL puts it one after that.
    """
    if end is None:
        end = mask.sum(1) - 1
    rewards = torch.where(mask, -kl_coef * kl, 0)
    return rewards.scatter_add(1, end[:, None], scores[:, None].to(rewards.dtype))


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` scaled to variance 1 (unbiased) over the True of `mask`, and to mean 0 if `shift_mean`; 0 elsewhere.

    As in [Z]'s code.
    """
    values = torch.where(mask, values, 0)
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (b, t).  [GAE] eq. 16, [PPO] eq. 11 and 12

    `values[:, t]` is V of the state in which token t is chosen; after the last token it is 0, as the episode is over.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Each response's reward less the mean of the others' to its prompt, (b,).  [RLOO]

    `rewards` (b,) has the `num_generations` responses to a prompt side by side.
    """
    groups = rewards.view(-1, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).flatten()


def grpo_advantages(rewards: Tensor, num_generations: int, scale: bool = True) -> Tensor:
    """Each response's reward less the mean of its group, (b,), and over its deviation if `scale`.  [GRPO] section 4.1.2

    `rewards` (b,) has the `num_generations` responses to a prompt side by side. The deviation is unbiased, and has 1e-4
    on it, as in TRL. Without it a prompt whose answers earn much the same weighs no more than another.  [Dr]
    """
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token, (b, t), to be minimised, and where the clip binds.  [PPO] eq. 7

    ρ = π/π_old;  −min(ρA, clip(ρ, 1 − ε, 1 + ε)A).  0 and False under the mask.
    """
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0))
    advantages = torch.where(mask, advantages, 0)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(free, clipped), clipped > free


def sequence_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float = 0.2
) -> tuple[Tensor, Tensor]:
    """`policy_losses` of whole responses, (b,), and where the clip binds: a response is one action.  [RLOO]

    The ratio is the product of the tokens'; `advantages` are (b,). The paper takes one step a rollout, where the ratio
    is 1 and the gradient REINFORCE's; the ratio and its clip are TRL's.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0).sum(1)
    everywhere = torch.ones_like(log_ratio, dtype=torch.bool)
    return policy_losses(log_ratio, torch.zeros_like(log_ratio), advantages, everywhere, cliprange)


def grpo_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float = 0.2,
    kl_coef: float = 0.0,
    estimator: KLEstimator = "k3",
) -> tuple[Tensor, Tensor]:
    """`policy_losses` with kl_coef · KL on top, (b, t), and where the clip binds.  [GRPO] eq. 3 and 4

    The KL is of the policy that learns, times ρ = π/π_old, as the tokens are π_old's. Without the ratio the gradient
    isn't the KL's, and of k1 it is 0 on average ([V3.2]; TRL's use_bias_correction_kl). 0 and False under the mask.
    """
    losses, clipped = policy_losses(logprobs, old_logprobs, advantages, mask, cliprange)
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0))
    kl = kl_estimate(torch.where(mask, logprobs, 0), torch.where(mask, ref_logprobs, 0), estimator)
    return losses + kl_coef * ratio * kl, clipped


def token_weights(mask: Tensor, loss_type: LossType = "dapo", response_length: int = 1) -> Tensor:
    """What each token of a rollout weighs in the loss of its response, (b, 1); a step's loss is a mean over responses.

    "grpo": 1 over the response's length, so that responses weigh the same, and long ones' tokens less ([GRPO] eq. 3);
    "dapo": 1 over the mean length, so that tokens weigh the same ([DAPO]); "dr_grpo": 1 over `response_length`, a
    constant, whatever the lengths ([Dr]).
    """
    lengths = mask.sum(1, keepdim=True).double()
    if loss_type == "dapo":
        lengths = lengths.mean().expand_as(lengths)
    if loss_type == "dr_grpo":
        lengths = torch.full_like(lengths, response_length)
    return 1 / lengths


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The clipped squared error of each value, (b, t), and where the clip binds.  [PPO] eq. 9, with
    the ½ and the clip of [Z]'s code

    ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²).  0 and False under the mask.
    """
    values = torch.where(mask, values, 0)
    old_values, returns = torch.where(mask, old_values, 0), torch.where(mask, returns, 0)
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.max(free, clipped), clipped > free


def entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(`logits`) over the last dimension: log Σe^z − Σ p·z."""
    return torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
