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


def refuse_unsupported(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, train_dataset: Dataset, max_positions: int
) -> None:
    """Raise `UserError`, before anything is written, for a run that TRL's trainer can't do, or does wrong silently."""
    if PartialState().num_processes > 1:
        raise UserError(
            "TRL's PPOTrainer fails under two processes (it looks for the policy inside "
            "DistributedDataParallel). Run one: accelerate launch --num_processes 1 recipes/ppo.py"
        )
    if args.resume_from_checkpoint is not None:
        raise UserError("TRL's PPOTrainer can't resume; start the run again in a new output_dir")
    if args.gradient_accumulation_steps > 1:
        raise UserError(
            "TRL's PPOTrainer miscounts its steps with gradient_accumulation_steps above 1. Set it to 1: a rollout is "
            "per_device_train_batch_size answers, and a step takes a num_mini_batches-th of them"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            "the pad token is the end-of-sequence token, and TRL's PPOTrainer masks padding: it would never train the "
            "end of an answer. Name another token as pad_token in the SFT model's tokenizer_config.json"
        )
    if len(train_dataset) < args.per_device_train_batch_size:
        raise UserError(
            f"{len(train_dataset)} prompts are fewer than one rollout of {args.per_device_train_batch_size} "
            "(per_device_train_batch_size); TRL would wait forever"
        )
    longest = max(len(ids) for ids in train_dataset["input_ids"]) + args.response_length
    if longest > max_positions:
        raise UserError(
            f"the longest prompt and response_length make {longest} tokens, and the model has {max_positions} "
            "positions; lower max_prompt_length or response_length"
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
    of which TRL copies the reference.
    """
    # TRL builds an Accelerator of its own, which learns the precision of the run from here alone.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
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
