"""What the tests of PPOTrainer share: tiny random models, what a run leaves behind, and how two runs are compared."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kochat_trl.ppo.roles import one_backbone
from kochat_trl.ppo.trainer import PPOTrainer
from tests.tiny import word_tokenizer

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB, EOS, PAD = 40, 1, 3
ROWS, LENGTH = 8, 6
NEVER = 1000  # the id of a token that no model here has
TRAINER_ARGUMENTS = {*inspect.signature(PPOTrainer).parameters} - {"value_model"}  # which is a setting too
ADAPTER = "adapter_model.safetensors"
VALUE = "value/adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def tokenizer(pad: int = PAD) -> PreTrainedTokenizerFast:
    return word_tokenizer(VOCAB, EOS, pad)


def prompts(count: int = 2 * ROWS) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": [rng.integers(4, VOCAB, 2 + i % 4).tolist() for i in range(count)]})


def nudge(model: torch.nn.Module, seed: int, by: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def classifier(folders: SimpleNamespace) -> GPT2ForSequenceClassification:
    model = GPT2ForSequenceClassification.from_pretrained(folders.base, num_labels=1)
    model.score.weight.data = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    return model


def adapters_apart(folders: SimpleNamespace, value_model: str | None = "adapter") -> dict[str, Any]:
    """Four PEFT models, each loaded alone, as arguments of the trainer."""

    def load(model: Any, adapter: Path, trained: bool = False) -> PeftModel:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trained)

    return {
        "model": load(GPT2LMHeadModel.from_pretrained(folders.base), folders.sft, True),
        "ref_model": load(GPT2LMHeadModel.from_pretrained(folders.base), folders.sft),
        "reward_model": load(classifier(folders), folders.reward),
        "value_model": load(classifier(folders), folders.reward, True) if value_model == "adapter" else None,
    }


def on_one_backbone(folders: SimpleNamespace, value_model: str | None = "adapter") -> dict[str, Any]:
    backbone = GPT2LMHeadModel.from_pretrained(folders.base)
    roles = one_backbone(backbone, str(folders.sft), str(folders.reward), value_model)
    return {"model": roles, "ref_model": None, "reward_model": None}


def whole_models(folders: SimpleNamespace, value_model: str | None = "adapter") -> dict[str, Any]:
    """Models without adapters, in float64, and a reference that the policy is apart from."""
    made: dict[str, Any] = {"model": GPT2LMHeadModel.from_pretrained(folders.base)}
    made["ref_model"] = GPT2LMHeadModel.from_pretrained(folders.base)
    made |= {name: classifier(folders) for name in ("reward_model", "value_model")}
    for seed, model in enumerate(made.values()):
        nudge(model, seed + 3, 0.05)
        model.double()
    if value_model != "adapter":
        made["value_model"] = None
    return made


def output_of(trainer: PPOTrainer) -> Path:
    return Path(trainer.args.output_dir)


def logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [{k: v for k, v in log.items() if k not in ("eps", "eval_runtime")} for log in trainer.state.log_history]


def samples(trainer: PPOTrainer, update: int) -> list[dict[str, Any]]:
    lines = (output_of(trainer) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [sample for sample in map(json.loads, lines) if sample["update"] == update]


def trained(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if p.requires_grad}


def change(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Train, and return how far each weight moved."""
    before = trained(trainer)
    trainer.train()
    return {name: weight - before[name] for name, weight in trained(trainer).items()}


def saved_change(trainer: PPOTrainer, folders: SimpleNamespace) -> dict[str, torch.Tensor]:
    """How far each weight in the files moved from the two adapters that it started as."""
    trainer.save_model()
    moved = {}
    for file, start in {ADAPTER: folders.sft, VALUE: folders.reward}.items():
        if file == VALUE and trainer.roles.value is None:
            continue
        before, after = load_file(start / ADAPTER), load_file(output_of(trainer) / file)
        assert before.keys() == after.keys()
        moved |= {f"{file}/{name}": after[name] - before[name] for name in before}
    return moved


def assert_same_change(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    largest = max(float(weight.abs().max()) for weight in other.values())
    assert largest > 1e-3
    for name in other:
        assert float((one[name] - other[name]).abs().max()) <= tolerance * largest, name


def assert_same_logs(one: PPOTrainer, other: PPOTrainer, tolerance: float = 1e-4) -> None:
    assert len(logs(one)) == len(logs(other)) > 0
    for mine, theirs in zip(logs(one), logs(other), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


FEW = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "total_episodes": 12}  # samples.jsonl has all scores
