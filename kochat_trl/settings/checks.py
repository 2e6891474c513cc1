"""Values that a recipe would refuse, or not obey, told before anything is loaded.

`parse.py` asks here for every config, so that `kochat run` hears of a mistake in PPO's before SFT is trained; the
trainers ask again, for scripts that build a config by themselves.
"""

import re
from typing import Any

from kochat_trl.errors import UserError, nearest
from kochat_trl.settings.keys import Stage
from kochat_trl.settings.ppo import PPOConfig

# Of keys that a script may set to anything.
CHOICES = {"kl_estimator": ["k1", "k2", "k3"], "advantages": ["gae", "rloo", "grpo"]}
CHOICES |= {"scale_rewards": ["group", "none"], "loss_type": ["grpo", "dapo", "dr_grpo"]}
# Keys that TRL's own PPOTrainer has not: `engine: trl` would ignore them.
OURS = ["value_model", "kl_target", "kl_horizon", "normalize_scores", "score_clip", "score_after_eos", "kl_limit"]
OURS += ["guard_updates", "advantages", "num_generations", "eval_strategy", "eval_on_start"]
OURS += ["reward_functions"]
# What `ppo/evaluation.py` says of answers, and of reward functions the mean of each.
EVALUATED = ["score", "length", "ended"]
# Keys that mean nothing without a value function (but `lam: 1`, by which a reward reaches all tokens before it, as it
# does there), and keys of GRPO alone.
OF_VALUES = ["value_model", "vf_coef", "cliprange_value", "gamma", "lam", "whiten_rewards", "score_after_eos"]
OF_GRPO = ["scale_rewards", "loss_type"]
DPO_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
DPO_LOSSES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
# The rules of `ppo/rewards.py`, which holds their code.
REWARD_FUNCTIONS = ("hangul", "polite", "ended", "repetition", "length", "overlong")


def check_values(stage: Stage, values: Any) -> None:
    """Raise `UserError` for values, attributes of `values`, with which the recipe of `stage` can't run."""
    for key, off in (("eval_strategy", "no"), ("eval_on_start", False)):
        if getattr(values, key) != off and not values.eval_files:
            raise UserError(f"{key}: found {getattr(values, key)}, and there are no eval_files to evaluate on")
    if values.shard_base:
        _check_sharding(values)
    if stage == "ppo":
        check_ppo(values)
    if stage == "dpo":
        check_dpo(values)
    if stage == "kto":
        check_kto(values)
    if stage == "reward":
        check_ranking_loss(values, values.center_rewards_coefficient)


def _check_sharding(values: Any) -> None:
    """Raise `UserError` for a base that can't be divided among processes."""
    if not values.use_peft:
        raise UserError("shard_base: divides what is frozen, and without LoRA nothing is; set use_peft: true")
    if values.load_in_8bit:
        raise UserError(
            "shard_base: bitsandbytes' int8 weights can't be divided; set load_in_8bit: false, for the base in the "
            "precision of the run, or load_in_4bit: true"
        )


def check_ppo(args: Any) -> None:
    """Raise `UserError` for what `PPOTrainer` can't do; `args` is a PPOConfig, or has its fields as attributes."""
    rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rollout % args.num_mini_batches:
        raise UserError(
            f"a rollout of {rollout} responses (per_device_train_batch_size · gradient_accumulation_steps) doesn't "
            f"divide into {args.num_mini_batches} mini-batches (num_mini_batches)"
        )
    if args.temperature <= 0:
        raise UserError(f"temperature: found {args.temperature}, expected above 0: PPO learns from samples")
    for key in ("save_strategy", "eval_strategy"):
        if (value := getattr(args, key)) not in ("no", "steps"):
            found = getattr(value, "value", value)  # of an enum, in a script
            raise UserError(f"{key}: found {found}, expected no or steps: PPO counts updates, not epochs")
    _check_evaluation(args)
    for key, choices in CHOICES.items():
        if getattr(args, key) not in choices:
            raise UserError(f"{key}: found '{getattr(args, key)}', expected {', '.join(choices[:-1])} or {choices[-1]}")
    if args.kl_target is not None and args.kl_target <= 0:
        raise UserError(f"kl_target: found {args.kl_target}, expected nats above 0")
    if args.total_episodes is not None and args.total_episodes < 1:
        raise UserError(f"total_episodes: found {args.total_episodes}, expected 1 or more")
    if args.stop_token and args.stop_token_id is not None:
        raise UserError("stop_token and stop_token_id are both set; remove one")
    if args.missing_eos_penalty is not None and not args.stop_token and args.stop_token_id is None:
        raise UserError("missing_eos_penalty: no response can end itself without a stop token; set stop_token: eos")
    _check_groups(args, rollout)
    _check_rewards(args)
    if args.engine == "trl":
        for key in OURS:
            if getattr(args, key) != getattr(PPOConfig, key):
                raise UserError(f"{key}: TRL's PPOTrainer has nothing like it; remove it, or set engine: kochat")
        if args.kl_estimator == "k2":
            raise UserError("kl_estimator: TRL's PPOTrainer has k1 and k3; set one, or engine: kochat")
        if args.resume_from_checkpoint is not None:
            raise UserError("TRL's PPOTrainer can't resume; start the run again in a new output_dir")


def _check_evaluation(args: Any) -> None:
    """Raise `UserError` for keys of evaluation that don't fit each other."""
    if args.eval_strategy == "steps" and not args.eval_steps:
        raise UserError("eval_steps: is not set; say after how many updates to evaluate, 10, say")
    metric, names = args.metric_for_best_model, [f"rewards/{name}/mean" for name in args.reward_functions or []]
    if metric is not None and metric.removeprefix("eval_") not in EVALUATED + names:
        raise UserError(f"metric_for_best_model: found '{metric}', expected eval_{', eval_'.join(EVALUATED + names)}")
    if not args.load_best_model_at_end:
        return
    if "no" in (args.eval_strategy, args.save_strategy):
        raise UserError(
            "load_best_model_at_end: needs eval_strategy: steps and save_strategy: steps, to find and keep it"
        )
    times = args.save_steps / args.eval_steps
    if round(times) < 1 or abs(times - round(times)) > 1e-9:
        raise UserError(
            f"load_best_model_at_end: save_steps ({args.save_steps:g}) isn't a multiple of eval_steps "
            f"({args.eval_steps:g}), so a checkpoint would have no evaluation; set both to {args.eval_steps:g}"
        )


def _check_groups(args: Any, rollout: int) -> None:
    """Raise `UserError` for keys that don't fit `advantages`."""
    size, method = args.num_generations, args.advantages
    if size < 1 or rollout % size:
        raise UserError(
            f"a rollout of {rollout} responses (per_device_train_batch_size · gradient_accumulation_steps) doesn't "
            f"divide into prompts with {size} responses each (num_generations)"
        )
    if method != "gae" and size < 2:
        raise UserError(
            f"num_generations: found {size}, and advantages: {method} compares the responses to one prompt: set 2 or "
            "more, 4, say"
        )
    for key in OF_VALUES * (method != "gae") + OF_GRPO * (method != "grpo"):
        if getattr(args, key) != getattr(PPOConfig, key) and (key, args.lam) != ("lam", 1):
            raise UserError(f"{key}: has no meaning for advantages: {method}; remove it")


def check_dpo(args: Any) -> None:
    """Raise `UserError` for what TRL's DPOTrainer would say once the models are loaded, or at the first step."""
    for loss in args.loss_type:
        if loss not in DPO_LOSSES:
            raise UserError(
                f"loss_type: found '{loss}'{nearest(loss, set(DPO_LOSSES), '')}; TRL has {', '.join(DPO_LOSSES)}"
            )
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise UserError("label_smoothing: `loss_type: [exo_pair]` needs one above 0, such as 1e-3")


def check_kto(args: Any) -> None:
    """Raise `UserError` for what TRL's KTOTrainer would say once the models are loaded."""
    if args.loss_type != "kto":
        return
    if args.per_device_train_batch_size < 2:
        raise UserError(
            "per_device_train_batch_size: found 1, expected 2 or more: KTO takes its KL from a batch's other answers"
        )
    if args.train_sampling_strategy != "sequential":
        raise UserError(
            f"train_sampling_strategy: found {args.train_sampling_strategy}, expected sequential: KTO takes its KL "
            "from a batch's other answers, so batches are made beforehand. Rows are shuffled once, by the seed"
        )


def _check_rewards(args: Any) -> None:
    """Raise `UserError` for `reward_functions`, or keys beside them, that mean nothing."""
    names, weights = args.reward_functions or [], args.reward_weights
    for name in names:
        if name not in REWARD_FUNCTIONS and not re.fullmatch(r"[\w.]+:\w+", name):
            known = ", ".join(REWARD_FUNCTIONS)
            raise UserError(
                f"reward_functions: found '{name}', expected {known}, or one of your own as module:function"
            )
    if len(set(names)) < len(names):
        raise UserError("reward_functions: one is named twice; give it a larger weight in reward_weights")
    if weights is not None and len(weights) != len(names):
        raise UserError(f"reward_weights: found {len(weights)}, expected one for each of {len(names)} reward_functions")
    if ("length" in names) != (args.target_length is not None):
        raise UserError("target_length: the tokens that the reward function `length` asks for; set both, or neither")
    if args.target_length is not None and args.target_length < 1:
        raise UserError(f"target_length: found {args.target_length}, expected tokens, 1 or more")
    if args.reward_model_path is None and (args.advantages, args.value_model) == ("gae", "adapter"):
        raise UserError("value_model: adapter starts as the reward model, and there is none; set value_model: shared")


def check_ranking_loss(recipe: Any, center_coefficient: float | None) -> None:
    """Raise `UserError` for keys of the reward model that mean nothing to the listwise loss."""
    if recipe.loss != "listwise":
        return
    given = {
        "pairs": recipe.pairs != "all",
        "rank_margins": recipe.rank_margins,
        "center_rewards_coefficient": center_coefficient,
    }
    for key, is_given in given.items():
        if is_given:
            raise UserError(f"{key}: has no meaning for `loss: listwise`, which has no pairs; remove it")
