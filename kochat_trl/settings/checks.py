"""Values that a recipe would refuse, or not obey, told before anything is loaded.

`parse.py` asks here for every config, so that `kochat run` hears of a mistake in PPO's before SFT is trained; the
trainers ask again, for scripts that build a config by themselves.
"""

import re
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.settings.keys import Stage
from kochat_trl.settings.ppo import PPOConfig

# Keys that TRL's own PPOTrainer has not: `engine: trl` would ignore them.
OURS = ["value_model", "kl_target", "kl_horizon", "normalize_scores", "score_clip", "score_after_eos", "kl_limit"]
OURS += ["guard_updates", "reward_functions"]
# The rules of `ppo/rewards.py`, which holds their code.
REWARD_FUNCTIONS = ("hangul", "polite", "ended", "repetition", "length", "overlong")


def check_values(stage: Stage, values: Any) -> None:
    """Raise `UserError` for values, attributes of `values`, with which the recipe of `stage` can't run."""
    if stage == "ppo":
        check_ppo(values)
        return
    if values.eval_strategy != "no" and not values.eval_files:
        raise UserError(f"eval_strategy: found {values.eval_strategy}, and there are no eval_files to evaluate on")
    if stage == "reward":
        check_ranking_loss(values, values.center_rewards_coefficient)


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
    if args.save_strategy not in ("no", "steps"):
        raise UserError("save_strategy: expected no or steps: PPO has no epochs to save after")
    if args.eval_strategy != "no" or args.load_best_model_at_end:
        raise UserError("eval_strategy, load_best_model_at_end: PPO has no evaluation; set num_sample_generations")
    if args.kl_estimator not in ("k1", "k2", "k3"):
        raise UserError(f"kl_estimator: found '{args.kl_estimator}', expected k1, k2 or k3")
    if args.kl_target is not None and args.kl_target <= 0:
        raise UserError(f"kl_target: found {args.kl_target}, expected nats above 0")
    if args.total_episodes is not None and args.total_episodes < 1:
        raise UserError(f"total_episodes: found {args.total_episodes}, expected 1 or more")
    if args.stop_token and args.stop_token_id is not None:
        raise UserError("stop_token and stop_token_id are both set; remove one")
    if args.missing_eos_penalty is not None and not args.stop_token and args.stop_token_id is None:
        raise UserError("missing_eos_penalty: no response can end itself without a stop token; set stop_token: eos")
    _check_rewards(args)
    if args.engine == "trl":
        for key in OURS:
            if getattr(args, key) != getattr(PPOConfig, key):
                raise UserError(f"{key}: TRL's PPOTrainer has nothing like it; remove it, or set engine: kochat")
        if args.kl_estimator == "k2":
            raise UserError("kl_estimator: TRL's PPOTrainer has k1 and k3; set one, or engine: kochat")
        if args.resume_from_checkpoint is not None:
            raise UserError("TRL's PPOTrainer can't resume; start the run again in a new output_dir")


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
    if args.reward_model_path is None and args.value_model == "adapter":
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
