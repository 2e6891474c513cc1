"""Will it fit? The memory that the three stages take, from shapes alone: no weight is loaded, and nothing is computed.

Each stage's own trainer takes a step on fake tensors, which have a shape and a dtype and no values, while a counter
follows the bytes that are alive. So attention, losses and quantized layers are counted as they are, not by a formula.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kochat_trl.desk.workflow.tracing import NoValues, bytes_of, storage_of, tensors_of
from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_config
from kochat_trl.settings.keys import Stage
from kochat_trl.settings.parse import Arguments, folder_of, parse_arguments, read_config

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")


@dataclass(frozen=True)
class Footprint:
    """The bytes at the fullest moment of a phase, with `rows` in a forward pass. `parts` add up to `peak`."""

    phase: str
    rows: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    config: str | Path, overrides: Sequence[str] = (), shape: PretrainedConfig | None = None, rows: int | None = None
) -> list[Footprint]:
    """The footprint of each phase of a run: SFT, reward model, PPO's update and its sampling.

    `config` is what `kochat run` takes, `overrides` are flags of the recipes. `shape` stands for the base model's own
    config, and `rows` for the rows of a forward pass. All texts are as long as the config allows. A config that
    doesn't set the precision is taken for a GPU's, bfloat16, unless it sets `use_cpu`.

    Raises `UserError` for what the recipes would refuse.
    """
    folder_of(Path(config))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: list[Footprint] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        stages: dict[Stage, Arguments] = {}
        on_cpu: dict[Stage, bool] = {}
        for stage in STAGES:
            given = {key: value for key, (value, _) in read_config(Path(config), stage).items()}
            on_cpu[stage] = bool(given.get("use_cpu"))
            as_it_is = on_cpu[stage] or given.get("bf16") is False
            half = [] if as_it_is else ["--bf16", "true", "--fp16", "false"]  # which are of one size
            flags = [*half, *overrides, "--use_cpu", "true", "--output_dir", folder, "--report_to", "none"]
            stages[stage] = parse_arguments(stage, str(config), flags)
        _refuse(stages)
        for stage, args in stages.items():
            model = stages["sft" if stage == "ppo" else stage].model
            own = copy.deepcopy(shape or load_config(str(model.model_name_or_path), model.model_revision))
            for name in ("attn_pdrop", "attention_dropout"):
                if hasattr(own, name) and not on_cpu[stage]:
                    setattr(own, name, 0.0)  # a GPU's fused attention keeps no mask for it; the CPU's keeps T² numbers
            found += trace(stage, args, stages, own, rows)
    return found


def _refuse(stages: dict[Stage, Arguments]) -> None:
    """Raise `UserError` for what is not planned."""
    if stages["ppo"].training.engine == "trl":
        raise UserError("engine: trl: that engine holds four models of their own, which isn't planned here")
    if len({args.model.use_peft for args in stages.values()}) > 1:
        raise UserError("use_peft: planned are runs with LoRA in all stages, or in none")
    for stage in ("sft", "reward"):
        if stages[stage].training.max_length is None:
            raise UserError(f"max_length of {stage} is not set: a text may be of any length")
    if stages["ppo"].recipe.max_prompt_length is None:
        raise UserError("max_prompt_length of ppo is not set: a prompt may be of any length")


def trace(
    stage: Stage, args: Arguments, stages: dict[Stage, Arguments], shape: PretrainedConfig, rows: int | None = None
) -> list[Footprint]:
    """The footprints of one stage's phases; optimizer states are there, as from the second step on."""
    if rows is not None:
        args.training.per_device_train_batch_size = rows
        if stage == "ppo":  # a rollout of one mini-batch's rows for each of them
            args.training.gradient_accumulation_steps = args.training.num_mini_batches
            args.training.local_rollout_forward_batch_size = rows
    with torch.device("meta"):
        model = _ppo_roles(args, stages, shape) if stage == "ppo" else _trained_model(stage, args, shape)
    with FakeTensorMode(allow_non_fake_inputs=True), NoValues():
        _materialize(model)
        trainer, phases = _PREPARE[stage](model, args)
        return [_measure(name, count, step, trainer, shape.vocab_size) for name, count, step in phases]


def _measure(phase: str, rows: int, step: Callable[[], None], trainer: Any, vocab_size: int) -> Footprint:
    model = getattr(trainer, "roles", trainer.model)
    weights = {storage_of(t): t for t in tensors_of(model)}.values()
    trained = bytes_of(t for t in weights if t.requires_grad)
