"""The keys that a config may have: this project's own, and which of the libraries' have no effect."""

from dataclasses import dataclass, field
from typing import Literal

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.rankings import Pairs

from trl import ModelConfig

Stage = Literal["sft", "reward", "ppo", "dpo", "kto"]
ON_SFT: tuple[Stage, ...] = ("ppo", "dpo", "kto")  # stages that go on with what SFT wrote, `sft_model_path`

# Keys of TRL's classes that have no effect in these recipes. Setting one is an error rather than a silence.
UNUSED_KEYS = {"bnb_4bit_quant_storage", "chat_template_path", "dataset_kwargs", "eos_token", "hub_model_id"}
UNUSED_KEYS |= {"hub_token", "lora_modules_to_save", "lora_target_parameters", "lora_task_type"}
UNUSED_KEYS |= {"model_init_kwargs", "pad_token", "push_to_hub"}
UNUSED_BY_PPO = {"dataset_num_proc", "ds3_gather_for_generation", "max_steps", "model_adapter_name"}
UNUSED_BY_PPO |= {"model_name_or_path", "ref_adapter_name"}
# Rows come tokenized, none too long; the reference stays what SFT wrote; and TRL has switched padding_free off.
UNUSED_BY_PREFERENCE = {"dataset_num_proc", "max_prompt_length", "model_name_or_path", "padding_free"}
UNUSED_BY_PREFERENCE |= {"ref_model_mixup_alpha", "ref_model_sync_steps", "sync_ref_model", "truncation_mode"}
REWARD_ONLY = {"loss", "pairs", "rank_margins", "ranking_order"}
# What an adapter has settled for a run that goes on with it, as PPO does with SFT's, and its name in PEFT's config.
LORA_FIELDS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_target_modules": "target_modules"}
LORA_FIELDS |= {"use_rslora": "use_rslora", "use_dora": "use_dora"}
UNUSED: dict[Stage, set[str]] = {
    "sft": UNUSED_KEYS | REWARD_ONLY | {"max_prompt_length"},
    "reward": UNUSED_KEYS | {"max_prompt_length"},
    "ppo": UNUSED_KEYS | REWARD_ONLY | UNUSED_BY_PPO,
    "dpo": UNUSED_KEYS | UNUSED_BY_PREFERENCE | (REWARD_ONLY - {"pairs", "ranking_order"}),
    "kto": UNUSED_KEYS | UNUSED_BY_PREFERENCE | (REWARD_ONLY - {"ranking_order"}),
}


@dataclass(kw_only=True)
class DataArguments(ReadingOptions):
    """How records become rows."""

    invalid_records: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Refuse a broken record, or leave it out and list it."}
    )
    overlong: Literal["error", "truncate", "drop"] = field(
        default="error",
        metadata={
            "help": "A row of more than max_length tokens (PPO: a prompt of more than max_prompt_length): refuse it, "
            "cut it (an answer at its end, a prompt at its start, inside the template) or leave it out. Either is "
            "listed in data_report.txt."
        },
    )
    pairs: Pairs = field(default="all", metadata={"help": "Which pairs of a ranking to train on."})
    rank_margins: bool = field(
        default=False, metadata={"help": "Reward: ask of a pair a margin of as many points as its ranks are apart."}
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig, one key of bitsandbytes that it lacks, and one for several processes."""

    llm_int8_threshold: float = field(
        default=6.0,
        metadata={
            "help": "int8: activation columns with an outlier above this are computed in float. They are picked over "
            "the whole batch, so a row depends on its neighbours; 0 turns it off."
        },
    )
    shard_base: bool = field(
        default=False, metadata={"help": "Divide the frozen base among the processes: for one larger than a card."}
    )


@dataclass(kw_only=True)
class RecipeArguments(DataArguments):
    """The keys of this project."""

    train_files: list[str] = field(metadata={"help": "Data files to train on."})
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "Held-out data files, in the shapes of train_files."}
    )
    loss: Literal["pairwise", "listwise", "all_pairs"] = field(
        default="pairwise",
        metadata={
            "help": "Reward: the mean over all pairs of a batch; the Plackett–Luce likelihood of each ranking; or the "
            "mean over the pairs of a ranking, then over rankings (InstructGPT)."
        },
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "PPO: longest templated prompt, in tokens."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Rename an output_dir that is not empty, and write a new one."}
    )
