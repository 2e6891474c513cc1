"""PPOConfig: the fields and defaults of TRL 1.12's, and the few keys that are this project's."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


def _derived() -> int | None:
    """A number that the trainer works out."""
    return field(default=None, init=False)


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`.

    A rollout is `per_device_train_batch_size · gradient_accumulation_steps` responses on each process; each of the
    `num_ppo_epochs` takes an optimizer step on each of `num_mini_batches` parts of it, in forward passes of
    `per_device_train_batch_size` rows.
    """

    # TRL's, where it differs from transformers
    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Has no effect: every update is logged, as in TRL."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Compute activations twice to save memory."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16 autocast; the default where fp16 is off."}
    )

    # TRL's own
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Has no effect, as in TRL."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in an epoch over a rollout."})
    total_episodes: int | None = field(default=None, metadata={"help": "Responses in all, else by num_train_epochs."})
    local_rollout_forward_batch_size: int = field(default=64, metadata={"help": "Rows that generate together."})
    num_sample_generations: int = field(default=10, metadata={"help": "Tables of answers to eval_dataset in a run."})
    response_length: int = field(default=53, metadata={"help": "Tokens in a response, at most."})
    stop_token: Literal["eos"] | None = field(default=None, metadata={"help": "What ends a response."})
    stop_token_id: int | None = field(default=None, metadata={"help": "The id of what ends a response."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling, and of every log-probability."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Cost of not ending a response."})
    sft_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "The policy to start from."})
    reward_model_path: str | None = field(
        default="EleutherAI/pythia-160m", metadata={"help": "The reward model; null where reward_functions suffice."}
    )
    model_adapter_name: str | None = field(default=None, metadata={"help": "The adapter of `model` to train."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "The adapter of `model` to keep close to."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "What a nat of KL from the reference costs."})
    kl_estimator: Literal["k1", "k2", "k3"] = field(default="k1", metadata={"help": "objective.kl_estimate's."})
    cliprange: float = field(default=0.2, metadata={"help": "ε of the policy's ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "ε of the value function."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Has no effect: DeepSpeed is refused."})

    # This project's
    engine: Literal["kochat", "trl"] = field(default="kochat", metadata={"help": "Our trainer, or TRL 1.12's own."})
    value_model: Literal["adapter", "shared"] = field(
        default="adapter",
        metadata={
            "help": "adapter: a model of its own, which on one backbone is an adapter; shared: a head on the policy's "
            "hidden states, one forward pass fewer."
        },
    )
    reward_functions: list[str] | None = field(
        default=None,
        metadata={"help": "Beside the reward model: hangul, polite, ended, repetition, length, overlong, module:name."},
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of reward_functions; 1 unless given."})
    target_length: int | None = field(default=None, metadata={"help": "Tokens that the reward `length` asks for."})
    kl_target: float | None = field(default=None, metadata={"help": "Nats a response: kl_coef keeps the KL there."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Responses over which kl_coef adapts."})
    normalize_scores: bool = field(default=False, metadata={"help": "Scale scores by their running mean and spread."})
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to ± this."})
    score_after_eos: bool = field(default=False, metadata={"help": "The score is one slot after the end, as in TRL."})
    kl_limit: float | None = field(default=None, metadata={"help": "Nats a response: a KL beyond it stops the run."})
    guard_updates: int = field(default=20, metadata={"help": "Updates in which nothing ends that stop the run."})

    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})

    # Worked out by the trainer, under TRL's names
    num_total_batches: int | None = _derived()  # updates
    local_batch_size: int | None = _derived()  # responses of a rollout: of a process, and of all
    batch_size: int | None = _derived()
    local_mini_batch_size: int | None = _derived()
    mini_batch_size: int | None = _derived()
    micro_batch_size: int | None = _derived()

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
