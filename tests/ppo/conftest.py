"""A tiny base with its two adapters, and a trainer of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.settings.ppo import PPOConfig
from tests.ppo.helpers import (
    EOS,
    LENGTH,
    LORA,
    PAD,
    ROWS,
    TRAINER_ARGUMENTS,
    VOCAB,
    classifier,
    nudge,
    on_one_backbone,
    prompts,
    tokenizer,
)
from tests.tiny import gpt2_config

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base that ends about every tenth token, and an SFT and a reward adapter on it."""
    folder = tmp_path_factory.mktemp("models")
    paths = SimpleNamespace(base=folder / "base", sft=folder / "sft", reward=folder / "reward")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(gpt2_config(VOCAB))
    base.config.pad_token_id = PAD
    nudge(base, 0, 0.1)
    with torch.no_grad():
        end = base.lm_head.weight[EOS]
        base.transformer.ln_f.bias.add_(1.3 * end / end.square().sum())
    base.save_pretrained(paths.base)
    tokenizer().save_pretrained(paths.base)
    sft = get_peft_model(GPT2LMHeadModel.from_pretrained(paths.base), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    nudge(sft, 1, 0.1)
    sft.save_pretrained(paths.sft)
    reward = get_peft_model(classifier(paths), LoraConfig(**LORA, task_type="SEQ_CLS"))
    nudge(reward, 2, 0.2)
    reward.save_pretrained(paths.reward)
    return paths


@pytest.fixture
def build(folders: SimpleNamespace, tmp_path: Path) -> Callable[..., PPOTrainer]:
    """A trainer of `models` (one of the functions in helpers.py, or its result) with an output folder of its own."""

    def build_trainer(models: Any = on_one_backbone, output: str = "output", **settings: Any) -> PPOTrainer:
        values: dict[str, Any] = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
        values |= {"per_device_train_batch_size": ROWS, "num_mini_batches": 2, "num_ppo_epochs": 2}
        values |= {"total_episodes": 3 * ROWS, "response_length": LENGTH, "stop_token": "eos", "temperature": 1.0}
        values |= {"max_grad_norm": 0.0, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
        values |= {"num_sample_generations": 0, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        extra = {name: settings.pop(name) for name in [*settings] if name in TRAINER_ARGUMENTS}
        values |= settings
        if callable(models):
            models = models(folders, values.get("value_model", "adapter" if "advantages" not in values else None))
        arguments = {"processing_class": tokenizer(), "train_dataset": prompts()} | models | extra
        return PPOTrainer(args=PPOConfig(output_dir=str(tmp_path / output), **values), **arguments)

    return build_trainer
