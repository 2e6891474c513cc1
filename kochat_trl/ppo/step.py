"""The forward passes of PPO, with gradients and without: what the models say of rows, and the gradients of its losses.

Scoring a rollout and learning from it go through the same `forward_policy` and `forward_value`, so that nothing but
the weights can set them apart; where the first step is one pass, it is the very pass that scored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kochat_trl.ppo import objective
from kochat_trl.ppo.logprobs import token_logprobs
from kochat_trl.ppo.roles import Role, Roles
from kochat_trl.ppo.rollout import Kept, MicroBatch, PolicyPass, Rollout, Trajectory
from kochat_trl.settings.ppo import PPOConfig

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

BUCKET = 2**25  # bytes of gradients that go together: what torch's DistributedDataParallel takes


class Whole(NamedTuple):
    """What there is in a mini-batch, of all processes: responses, their tokens, and the states whose value counts."""

    responses: int
    tokens: Tensor
    states: Tensor


class StepStats(NamedTuple):
    """Means over the tokens of a mini-batch, as scalars: of a micro-batch, its share in them. 0 of what there isn't."""

    policy_loss: Any
    value_loss: Any
    clipfrac: Any
    value_clipfrac: Any
    approxkl: Any
    entropy: Any
    ratio: Any


def forward_policy(
    role: Role, rollout: Rollout, batch: MicroBatch, temperature: float, dtype: torch.dtype
) -> PolicyPass:
    """What the policy (or the reference) says of m rows, while it is active."""
    mask = rollout.mask[batch.rows]
    hidden = batch.hidden(role)
    logprobs, entropies = token_logprobs(
        role.head, batch.states(hidden, mask), rollout.tokens[batch.rows][mask], temperature
    )
    return PolicyPass(spread(logprobs, mask, dtype), entropies, hidden)


def forward_value(
    role: Role, rollout: Rollout, batch: MicroBatch, dtype: torch.dtype, hidden: Tensor | None = None
) -> Tensor:
    """The values, (m, t), of m rows, while the role is active; 0 where none counts. `hidden` are the policy's states,
    where the head reads those."""
    mask = rollout.value_mask[batch.rows]
    hidden = batch.hidden(role) if hidden is None else hidden
    return spread(role.head(batch.states(hidden, mask)).squeeze(-1), mask, dtype)


def forward_reward(role: Role, batch: MicroBatch) -> Tensor:
    """The reward model's scores of m rows, (m,)."""
    with role.active():
        return role.head(batch.end_states(batch.hidden(role))).squeeze(-1)


@torch.no_grad()
def score_rollout(
    roles: Roles,
    rollout: Rollout,
    batches: Sequence[MicroBatch],
    temperature: float,
    dtype: torch.dtype,
    keep: bool = False,
) -> Trajectory:
    """What the models say of the rows in `batches`; 0 elsewhere. `keep` the graphs of the last one."""
    found = Trajectory.zeros(rollout.mask.shape, rollout.tokens.device, dtype)
    for number, batch in enumerate(batches, start=1):
        rows, kept = batch.rows, keep and number == len(batches)
        with roles.reference.active():
            found.ref_logprobs[rows] = forward_policy(roles.reference, rollout, batch, temperature, dtype).logprobs
        if roles.reward:
            found.scores[rows] = forward_reward(roles.reward, batch).to(dtype)
        values = None
        with torch.set_grad_enabled(kept):  # at the end, so that no other model runs while graphs are held
            if roles.value and not roles.value_reads_policy:
                with roles.value.active():
                    values = forward_value(roles.value, rollout, batch, dtype)
            with roles.policy.active():
                said = forward_policy(roles.policy, rollout, batch, temperature, dtype)
                if roles.value and roles.value_reads_policy:
                    values = forward_value(roles.value, rollout, batch, dtype, said.hidden)
        found.logprobs[rows] = said.logprobs.detach()
        if values is not None:
            found.values[rows] = values.detach()
        if kept:
            found.kept = Kept(said, values)
    return found


def group_advantages(args: PPOConfig, rewards: Tensor) -> Tensor:
    """Of RLOO or GRPO, (b,), from the rewards of responses, (b,), those to a prompt side by side."""
    if args.advantages == "rloo":
        return objective.rloo_advantages(rewards, args.num_generations)
    return objective.grpo_advantages(rewards, args.num_generations, scale=args.scale_rewards == "group")


def policy_loss(
    args: PPOConfig,
    rollout: Rollout,
    rows: Tensor,
    trajectory: Trajectory,
    logprobs: Tensor,
    kl_coef: float,
    whole: Whole,
) -> tuple[Tensor, Tensor]:
    """The share of m rows in the policy's loss of a mini-batch, and in the fraction that is clipped.

    `logprobs` are (m, t), with gradients. PPO's loss is a mean over tokens, RLOO's over responses; GRPO's over
    responses too, whose tokens weigh what `loss_type` says, and it has the KL in it.
    """
    mask, old, advantages = rollout.mask[rows], trajectory.logprobs[rows], trajectory.advantages[rows]
    if args.advantages == "rloo":
        losses, clipped = objective.sequence_losses(logprobs, old, advantages[:, 0], mask, args.cliprange)
        return losses.sum() / whole.responses, clipped.sum() / whole.responses
    if args.advantages == "gae":
        losses, clipped = objective.policy_losses(logprobs, old, advantages, mask, args.cliprange)
        return losses.sum() / whole.tokens, clipped.sum() / whole.tokens
    ref = trajectory.ref_logprobs[rows]
    losses, clipped = objective.grpo_losses(
        logprobs, old, ref, advantages, mask, args.cliprange, kl_coef, args.kl_estimator
    )
    weights = objective.token_weights(rollout.mask, args.loss_type, args.response_length)[rows].to(losses.dtype)
    return (weights * losses).sum() / whole.responses, clipped.sum() / whole.tokens


def add_gradients(
    roles: Roles,
    rollout: Rollout,
    batch: MicroBatch,
    trajectory: Trajectory,
    args: PPOConfig,
    accelerator: Accelerator,
    kl_coef: float,
    whole: Whole,
) -> tuple[StepStats, Tensor]:
    """Add a micro-batch's gradients, policy first and then value: but for what scoring kept, which is used up, no two
    models' activations are held at once.

    Losses are divided by what is in the `whole` mini-batch. Returns the share in its means, and how far the furthest
    log-probability is from the rollout's.
    """
    kept, trajectory.kept = trajectory.kept, None
    rows, dtype = batch.rows, trajectory.logprobs.dtype
    mask, value_mask = rollout.mask[rows], rollout.value_mask[rows]
    old_logprobs, old_values = trajectory.logprobs[rows], trajectory.values[rows]

    def value_loss(value: Role, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = kept.values if kept else forward_value(value, rollout, batch, dtype, hidden)
        losses, clipped = objective.value_losses(
            values, old_values, trajectory.returns[rows], value_mask, args.cliprange_value
        )
        return losses.sum() / whole.states, clipped.sum() / whole.states

    def backward(loss: Tensor) -> None:
        scaler = accelerator.scaler  # of fp16
        (loss if scaler is None else scaler.scale(loss)).backward()

    with roles.policy.active():
        with accelerator.autocast():
            said = kept.policy if kept else forward_policy(roles.policy, rollout, batch, args.temperature, dtype)
            logprobs, entropies, hidden = said
            pg_loss, clipped = policy_loss(args, rollout, rows, trajectory, logprobs, kl_coef, whole)
            loss, vf_loss, vf_clipped = pg_loss, torch.zeros_like(pg_loss), torch.zeros_like(pg_loss)
            if roles.value and roles.value_reads_policy:
                vf_loss, vf_clipped = value_loss(roles.value, hidden)
                loss = pg_loss + args.vf_coef * vf_loss
        backward(loss)
    if roles.value and not roles.value_reads_policy:
        with roles.value.active():
            with accelerator.autocast():
                vf_loss, vf_clipped = value_loss(roles.value)
            backward(args.vf_coef * vf_loss)

    moved = (logprobs - old_logprobs).detach()  # 0 under the mask
    stats = StepStats(
        pg_loss.detach(),
        vf_loss.detach(),
        clipped,
        vf_clipped,
        approxkl=0.5 * moved.square().sum() / whole.tokens,
        entropy=entropies.sum() / whole.tokens,
        ratio=(moved.exp() * mask).sum() / whole.tokens,
    )
    return stats, moved.abs().max()


def sum_gradients(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """Sum the gradients of all processes, many small ones in one message; a weight that has none gets it."""
    if processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _take_tensors([parameter.grad for parameter in parameters], BUCKET):
        flat = _flatten_dense_tensors(bucket)
        torch.distributed.all_reduce(flat)
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def spread(flat: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `flat` in the True of `mask`, in order; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, flat.to(dtype))
