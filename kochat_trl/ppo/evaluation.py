"""Watching a run: greedy answers to held-out prompts, and what they score.

Nothing here draws a random number or changes a weight, so a run is the same with evaluations and without.
"""

import time
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.sharding import in_step
from kochat_trl.ppo.objective import final_scores
from kochat_trl.ppo.rollout import Rollout
from kochat_trl.ppo.step import forward_reward

import torch
from datasets import Dataset
from torch import Tensor


@torch.no_grad()
def greedy_answers(trainer: Any, dataset: Dataset, count: int) -> tuple[Rollout, dict[str, Tensor], Tensor]:
    """Answer the first `count` prompts of `dataset` with the likeliest tokens: answers, rewards and scores, (count,).

    Every process of `trainer`, a PPOTrainer, answers its share, `local_rollout_forward_batch_size` prompts at a time,
    scores it, `per_device_eval_batch_size` at a time, and gets all.
    """
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    model, functions = trainer.roles.reward, trainer.reward_functions
    prompts = trainer.prompt_ids([dataset[i] for i in range(count)])
    rollout = trainer.answer(prompts, [0] * count, temperature=0.0)
    scores = torch.zeros(count, dtype=trainer.dtype, device=accelerator.device)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    with accelerator.autocast(), in_step(model and model.backbone):
        for start in range(0, len(mine) if model else 0, size):
            batch = rollout.micro_batch(mine[start : start + size])
            scores[batch.rows] = forward_reward(model, batch).to(trainer.dtype)
    rewards = {"reward_model": scores} if model else {}
    rewards |= functions.of_rollout(rollout, mine, trainer.processing_class) if functions else {}
    rewards = accelerator.reduce(rewards, "sum")
    return rollout, rewards, rewards.get("reward_model", 0.0) + (functions.total(rewards) if functions else 0.0)


def evaluate(trainer: Any, dataset: Dataset | None, prefix: str) -> dict[str, float]:
    """Means over all prompts of `dataset`, under the names in `settings.checks.EVALUATED` after the `prefix`.

    `score` is as in `objective/scores`, so less the penalty for not ending; `length` is in tokens; `ended` is the share
    that ended themselves. With reward functions there is each alone, as while training. `runtime` is in seconds.
    Raises `UserError` without prompts.
    """
    if not dataset:
        raise UserError("there are no prompts to evaluate on: give an eval_dataset")
    started = time.perf_counter()
    rollout, rewards, scores = greedy_answers(trainer, dataset, len(dataset))
    found = {
        "score": final_scores(scores, rollout.ended, trainer.args.missing_eos_penalty).mean().item(),
        "length": rollout.mask.sum(1).float().mean().item(),
        "ended": rollout.ended.float().mean().item(),
        "runtime": time.perf_counter() - started,
    }
    if trainer.reward_functions:
        found |= {f"rewards/{name}/mean": each.mean().item() for name, each in rewards.items()}
    return {f"{prefix}_{name}": value for name, value in found.items()}
