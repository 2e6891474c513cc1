"""What a PPO run tells while it goes: TRL's metrics, samples of each update, and a table of answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kochat_trl.files import replace_file
from kochat_trl.models.template import answer_text
from kochat_trl.ppo.objective import final_scores
from kochat_trl.ppo.rollout import Rollout, Trajectory
from kochat_trl.ppo.step import StepStats

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

SAMPLES = 4  # responses of each update that samples.jsonl keeps
SHOWN = 5  # answers in a table


def update_metrics(
    rollout: Rollout,
    trajectory: Trajectory,
    kl: Tensor,
    earned: Tensor,
    kl_coef: float,
    missing_eos_penalty: float | None,
    stats: Sequence[StepStats],
    has_value: bool,
) -> dict[str, float]:
    """TRL's metrics, and the KL coefficient. Sums over a response, means over tokens and steps.

    `kl` is (b, t). `earned`, (b,), is what the policy learns from, after normalising and clipping: it is in
    `objective/rlhf_reward`. `objective/scores` is the reward model's and the reward functions', less the penalty for
    not ending: where scores are normalised it shows whether they rise. With reward functions there is the mean of each
    alone, `rewards/NAME/mean` as TRL's GRPO has it, and of `reward_model` if there is one.
    """
    scores = final_scores(trajectory.scores, rollout.ended, missing_eos_penalty)
    means = StepStats(*np.mean(np.array(stats), axis=0).tolist())
    ratios = [step.ratio for step in stats]
    a_response = torch.where(rollout.mask, kl, 0).sum(1).mean().item()
    value = {"loss/value_avg": means.value_loss, "val/clipfrac_avg": means.value_clipfrac} if has_value else {}
    return {
        "objective/kl": a_response,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -torch.where(rollout.mask, trajectory.logprobs, 0).sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * a_response,
        "objective/rlhf_reward": earned.mean().item() - kl_coef * a_response,
        "objective/scores": scores.mean().item(),
        "objective/response_tokens": rollout.mask.sum(1).float().mean().item(),
        "policy/approxkl_avg": means.approxkl,
        "policy/clipfrac_avg": means.clipfrac,
        "policy/entropy_avg": means.entropy,
        "loss/policy_avg": means.policy_loss,
        **value,
        "val/ratio": means.ratio,
        "val/ratio_var": float(np.var(ratios, ddof=1)) if len(stats) > 1 else 0.0,
        "val/num_eos_tokens": int(rollout.ended.sum()),
    } | {f"rewards/{name}/mean": earned.mean().item() for name, earned in trajectory.rewards.items()}


def write_samples(
    file: Path, update: int, tokenizer: Any, rollout: Rollout, trajectory: Trajectory, kl: Tensor
) -> None:
    """Append the first responses of an update to `file`, JSON lines."""
    with open(file, "a", encoding="utf-8") as stream:
        for row in range(min(SAMPLES, len(rollout.prompts))):
            sample = {
                "update": update + 1,
                "prompt": tokenizer.decode(rollout.prompts[row], skip_special_tokens=True),
                "response": answer_text(tokenizer, rollout.responses[row]),
                "ended": bool(rollout.ended[row]),
                "score": trajectory.scores[row].item(),
                "kl": kl[row][rollout.mask[row]].sum().item(),
            }
            stream.write(json.dumps(sample, ensure_ascii=False) + "\n")


def forget_samples_after(file: Path, update: int) -> None:
    """Drop the samples of updates that are made again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update]
        replace_file(file, "".join(kept))


def print_answers(tokenizer: Any, rollout: Rollout, scores: Sequence[float]) -> None:
    """The first prompts with their responses and scores, as a table of the terminal."""
    table = Table("prompt", "response", "score", show_lines=True)
    for prompt, response, score in list(zip(rollout.prompts, rollout.responses, scores, strict=True))[:SHOWN]:
        texts = tokenizer.decode(prompt, skip_special_tokens=True), answer_text(tokenizer, response)
        table.add_row(*map(Text, texts), f"{score:.2f}")
    Console().print(table)
