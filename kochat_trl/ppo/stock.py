"""PPO on TRL 1.12's own PPOTrainer, the last release that has it: `engine: trl`.

The only module that imports `trl.experimental`.
"""

import logging
import os
from copy import deepcopy
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning says only that the API may change

from kochat_trl.errors import UserError
from kochat_trl.models.loading import cast_trainable_to_float32
from kochat_trl.models.template import answer_shape
from kochat_trl.ppo.roles import Roles
from kochat_trl.settings.ppo import PPOConfig

from accelerate import PartialState
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def refuse_unsupported(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, train_dataset: Dataset) -> None:
    """Raise `UserError`, before anything is written, for a run that TRL's trainer can't do, or does wrong silently."""
    if PartialState().num_processes > 1:
        raise UserError(
            "TRL's PPOTrainer fails under two processes (it looks for the policy inside "
            "DistributedDataParallel). Run one, or set engine: kochat"
        )
    if tokenizer.pad_token_id == answer_shape(tokenizer).end_id:
        raise UserError(
            f"the pad token, {tokenizer.pad_token}, is the one that ends an answer. TRL's PPOTrainer masks padding, so "
            "it would never train the end of an answer. Name another token as pad_token in the SFT model's "
            "tokenizer_config.json"
        )
    if len(train_dataset) < (rollout := args.per_device_train_batch_size * args.gradient_accumulation_steps):
        raise UserError(f"{len(train_dataset)} prompts are fewer than one rollout of {rollout}; TRL would wait forever")


def build_trainer(
    values: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    roles: Roles,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
) -> Any:
    """TRL's PPOTrainer with the models of `roles`, which must be separate, and the settings of a resolved config.

    TRL miscounts its steps with gradient accumulation, so it gets the same rollout without: a mini-batch goes through
    the model whole. It never clips gradients.
    """
    try:
        from trl.experimental import ppo
    except ImportError:
        raise UserError(
            "engine: trl needs TRL 1.12, the last release with PPOTrainer: pip install trl==1.12.0"
        ) from None
    values = dict(values)
    values["per_device_train_batch_size"] *= values["gradient_accumulation_steps"]
    values["gradient_accumulation_steps"] = 1
    values["model_adapter_name"] = roles.policy.adapter
    values["ref_adapter_name"] = roles.reference.adapter
    if values["stop_token"] == "eos":
        # TRL's trainer stops, and penalizes, at the tokenizer's end-of-sequence token alone.
        tokenizer = deepcopy(tokenizer)
        tokenizer.eos_token = answer_shape(tokenizer).end
    (args,) = HfArgumentParser(ppo.PPOConfig).parse_dict(values, allow_extra_keys=True)  # type: ignore[arg-type]
    if args.max_grad_norm:
        logger.info("engine: trl: gradients are not clipped (max_grad_norm)")
    # TRL builds an Accelerator of its own, which learns the precision of the run from here alone.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    models: dict[str, Any] = dict(roles.models.items())
    trainer = ppo.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models.get("reference"),
        reward_model=models["reward"],
        value_model=models["value"],
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    cast_trainable_to_float32(trainer.model)
    return trainer
