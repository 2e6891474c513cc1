"""PPO on TRL 1.12's own PPOTrainer, the last release that has it.

The only module that imports `trl.experimental`.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning says only that the API may change

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.experimental.ppo import PPOConfig, PPOTrainer

from ..errors import UserError

__all__ = ["PPOConfig", "build_trainer", "refuse_unsupported"]


def refuse_unsupported(args: PPOConfig, train_dataset: Dataset) -> None:
    """Raise `UserError`, before anything is written, for a run that TRL's trainer can't do."""
    if PartialState().num_processes > 1:
        raise UserError(
            "TRL's PPOTrainer fails under two processes (it looks for the policy inside "
            "DistributedDataParallel). Run one: accelerate launch --num_processes 1 recipes/ppo.py"
        )
    if args.resume_from_checkpoint is not None:
        raise UserError("TRL's PPOTrainer can't resume; start the run again in a new output_dir")
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if len(train_dataset) < batch_size:
        raise UserError(
            f"{len(train_dataset)} prompts are fewer than one rollout of {batch_size} "
            "(per_device_train_batch_size × gradient_accumulation_steps); TRL would wait forever"
        )


def build_trainer(
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reward_model: PreTrainedModel,
    value_model: PreTrainedModel,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
) -> PPOTrainer:
    """TRL's PPOTrainer on tokenized prompts (a column `input_ids`).

    `policy` is either a PEFT model, and its base with the adapter switched off is the reference, or a full model,
    of which TRL copies the reference. Raises `UserError` if prompt and response can outgrow the model's positions.
    """
    longest = max(len(ids) for ids in train_dataset["input_ids"]) + args.response_length
    positions = policy.config.max_position_embeddings
    if longest > positions:
        raise UserError(
            f"the longest prompt and response_length make {longest} tokens, and the model has {positions} "
            "positions; lower max_prompt_length or response_length"
        )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
