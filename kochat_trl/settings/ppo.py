"""PPOConfig: the fields and defaults of TRL 1.12's, and the few keys that are this project's."""

import math
from dataclasses import dataclass, field
from typing import Literal

from kochat_trl.errors import UserError

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

    # TRL's, of its RLOOConfig and GRPOConfig
    num_generations: int = field(default=1, metadata={"help": "Responses to each prompt of a rollout."})
    scale_rewards: Literal["group", "none"] = field(
        default="group", metadata={"help": "GRPO: advantages over the deviation of their group, or as they are."}
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = field(
        default="dapo", metadata={"help": "GRPO: what a token weighs, objective.token_weights."}
    )

    # This project's
    advantages: Literal["gae", "rloo", "grpo"] = field(
        default="gae",
        metadata={"help": "gae: of a value model; rloo, grpo: over the other responses to a prompt, without one."},
    )
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

    @property
    def value_function(self) -> Literal["adapter", "shared"] | None:
        """`value_model`, or None where advantages need none."""
        return self.value_model if self.advantages == "gae" else None

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_score"
        super().__post_init__()


def divide_batches(args: PPOConfig, prompts: int, processes: int) -> None:
    """Work out TRL's batch sizes: rollout, mini-batch, micro-batch; of a process (`local_`) and of all.

    Raises `UserError` if there are fewer prompts than a rollout takes.
    """
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.batch_size = args.local_batch_size * processes
    args.mini_batch_size = args.batch_size // args.num_mini_batches
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.micro_batch_size = min(args.per_device_train_batch_size, args.local_mini_batch_size)
    if prompts < args.batch_size // args.num_generations:
        raise UserError(
            f"{prompts} prompts are fewer than one rollout of {args.batch_size // args.num_generations} "
            "(per_device_train_batch_size · gradient_accumulation_steps · processes / num_generations)"
        )
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * prompts * args.num_generations)
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
