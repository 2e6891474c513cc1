"""What stops a run that has gone wrong: each guard raises `UserError`, and says what to do."""

import math
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.ppo.roles import Roles
from kochat_trl.ppo.rollout import Trajectory
from kochat_trl.ppo.step import StepStats
from kochat_trl.settings.ppo import PPOConfig

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

TOLERANCE = 1e-5  # of log-probabilities that must be equal before anything is learnt
ROUNDED = 0.05  # the same where models compute in 16 bits
MOVES_WITHIN = 3  # updates
LARGE_SCORE = 100.0  # of a head: far beyond soft caps, which are at 15 to 50
HEAD_WITHIN, HEAD_WITHIN_ROUNDED = 1e-3, 0.03  # of the largest logit, that two ways to compute it may differ by


def check_prompts(positions: int | None, response_length: int, *datasets: Any) -> None:
    """A prompt and its response must not take more positions than the model has; None is no limit."""
    longest = max(len(ids) for data in datasets if data is not None for ids in data["input_ids"]) + response_length
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest prompt and response_length make {longest} tokens, and the model has {positions} positions; "
            "lower max_prompt_length or response_length"
        )


def check_value(roles: Roles, args: PPOConfig) -> None:
    """Roles that a script made by itself must have a value function if the advantages are of one, and else none."""
    if (roles.value is None) != (args.value_function is None):
        has = "no value function" if roles.value is None else "a value function"
        raise UserError(
            f"the roles have {has}, and advantages is {args.advantages}: make them with `value_function` of the config "
            "(load_roles, one_backbone)"
        )


def check_shards(roles: Roles, args: Any) -> None:
    """A divided base goes forward on all processes at once, so each must have as many micro-batches as the others."""
    mini, micro = args.local_mini_batch_size, args.micro_batch_size
    if mini % micro and any(isinstance(parameter, DTensor) for parameter in roles.parameters()):
        raise UserError(
            f"shard_base: the {mini} rows of a process in a mini-batch don't divide into forward passes of {micro}; "
            "set per_device_train_batch_size to what divides them"
        )


@torch.no_grad()
def check_head(roles: Roles, accelerator: Accelerator, exact: bool) -> None:
    """The policy's logits must be what its head makes of its hidden states: `LMHead` has to know all that is done to
    them after it. The head is handed longer vectors, so that a soft cap or a scale that was missed shows.
    """
    policy, causal_lm = roles.policy, roles.models["policy"]
    ids = torch.arange(2, device=accelerator.device)[None]
    linear: Any = policy.head.linear
    stretch = 1.0
    with policy.active(), accelerator.autocast():
        hidden = policy.hidden(ids, torch.ones_like(ids))
        if largest := linear(hidden).abs().max().item():
            stretch = LARGE_SCORE / largest
        ours = policy.head(hidden * stretch)
        hook = linear.register_forward_pre_hook(lambda module, args: (args[0] * stretch,))
        try:
            theirs = causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            hook.remove()
    apart = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-6)
    if not apart <= (HEAD_WITHIN if exact else HEAD_WITHIN_ROUNDED):
        raise UserError(
            f"{type(causal_lm).__name__} does something to its logits that is not known here (they differ by "
            f"{apart:.0%}), so PPO can't score it; please report this with its config.json"
        )


def check_equal_at_start(what: str, difference: float, exact: bool) -> None:
    """Log-probabilities that must be equal, as nothing is learnt yet; `exact` is without 16-bit numbers."""
    if not difference <= (TOLERANCE if exact else ROUNDED):
        raise UserError(
            f"update 1: {what} differ by up to {difference:.1e} nats, and must be equal, as nothing is learnt yet. "
            "With load_in_8bit set llm_int8_threshold: 0; else please report this"
        )


def check_finite(update: int, trajectory: Trajectory) -> None:
    """All numbers of a scored rollout."""
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        if not getattr(trajectory, name).isfinite().all():
            raise UserError(
                f"update {update + 1}: {name} of the rollout are not finite. Look at the losses before, and lower the "
                "learning rate; if it is the first update, the model on disk is broken"
            )


def check_kl(update: int, kl: float, limit: float | None) -> None:
    """The mean KL of a response, in nats."""
    if limit is not None and kl > limit:
        raise UserError(
            f"update {update + 1}: the KL from the reference is {kl:.1f} nats a response, beyond kl_limit ({limit}). "
            "The policy has left the language it was taught: raise kl_coef, set kl_target, or lower the learning rate"
        )


def check_ends(update: int, updates_without_end: int, args: PPOConfig) -> None:
    """Responses of a run that has a stop token."""
    if updates_without_end >= args.guard_updates:
        raise UserError(
            f"update {update + 1}: not one response ended itself in {args.guard_updates} updates (guard_updates). "
            f"Raise response_length ({args.response_length}), or train SFT for longer: it teaches the end"
        )


def check_step(update: int, stats: StepStats) -> None:
    """The losses of a step and what is told of them."""
    if not all(math.isfinite(value) for value in stats):
        raise UserError(f"update {update + 1}: the loss is not finite ({stats._asdict()}); lower the learning rate")


def check_gradient(update: int, norm: Tensor) -> None:
    """The norm of a step's gradient."""
    if not norm.isfinite():
        raise UserError(f"update {update + 1}: a gradient is not finite; lower the learning rate")


def check_moved(update: int, before: Any, now: Any, args: PPOConfig) -> None:
    """The fingerprints of the policy before the run's first updates and after them."""
    if now == before:
        raise UserError(
            f"update {update + 1}: no weight of the policy has moved in {MOVES_WITHIN} updates. Look at learning_rate "
            f"({args.learning_rate}) and lr_scheduler_type ({args.lr_scheduler_type})"
        )


@torch.no_grad()
def fingerprint(weights: Any) -> list[tuple[float, float]]:
    """Two sums of each weight that can be trained."""
    doubles = (weight.double() for weight in weights if weight.requires_grad)
    return [(weight.sum().item(), weight.square().sum().item()) for weight in doubles]
