"""Values that a recipe refuses are told when a config is resolved: before anything is loaded, and by `kochat run`."""

import re
from dataclasses import fields

from kochat_trl.errors import UserError
from kochat_trl.settings.checks import DPO_LOSSES, OURS
from kochat_trl.settings.parse import changed_setting, parse_arguments, resolve_arguments

import pytest
import yaml
from trl import DPOConfig

PPO = "train_files: [a]\nsft_model_path: a\nreward_model_path: b\noutput_dir: c\n"
EVALUATED = "eval_files: [b]\neval_strategy: steps\neval_steps: 4\n"
BEST = EVALUATED + "save_strategy: steps\nload_best_model_at_end: true\n"
OTHER = "train_files: [a]\nmodel_name_or_path: a\noutput_dir: c\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("save_strategy: epoch", "save_strategy: found epoch, expected no or steps"),
        ("eval_strategy: steps", "eval_strategy: found steps, and there are no eval_files"),
        ("eval_on_start: true", "eval_on_start: found True, and there are no eval_files"),
        ("eval_files: [b]\neval_strategy: epoch", "eval_strategy: found epoch, expected no or steps"),
        ("eval_files: [b]\neval_strategy: steps", "eval_steps: is not set; say after how many updates"),
        ("metric_for_best_model: loss", "found 'loss', expected eval_score, eval_length, eval_ended"),
        ("load_best_model_at_end: true", "needs eval_strategy: steps and save_strategy: steps"),
        (EVALUATED + "save_strategy: 'no'\nload_best_model_at_end: true", "needs eval_strategy: steps and save_strat"),
        (BEST + "save_steps: 6", r"save_steps \(6\) isn't a multiple of eval_steps \(4\).* set both to 4"),
        (BEST + "save_steps: 2", r"save_steps \(2\) isn't a multiple of eval_steps \(4\)"),
        ("per_device_train_batch_size: 4\nnum_mini_batches: 3", "a rollout of 4 .* doesn't divide into 3 mini-batches"),
        ("missing_eos_penalty: 1.0", "missing_eos_penalty: no response can end itself"),
        ("stop_token: eos\nstop_token_id: 1", "stop_token and stop_token_id are both set"),
        ("temperature: 0", "temperature: found 0.0, expected above 0"),
        ("kl_target: 0", "kl_target: found 0.0, expected nats above 0"),
        ("total_episodes: 0", "total_episodes: found 0, expected 1 or more"),
        ("reward_functions: [hangull]", "reward_functions: found 'hangull', expected hangul, polite"),
        ("reward_functions: [rules.py]", "reward_functions: found 'rules.py'"),
        ("reward_functions: [hangul, hangul]", "one is named twice"),
        ("reward_functions: [hangul]\nreward_weights: [1, 2]", "reward_weights: found 2, expected one for each of 1"),
        ("reward_weights: [1.0]", "reward_weights: found 1, expected one for each of 0"),
        ("reward_functions: [length]", "target_length: the tokens that the reward function `length` asks for"),
        ("reward_functions: [hangul]\ntarget_length: 9", "target_length: the tokens .* set both, or neither"),
        ("reward_functions: [length]\ntarget_length: 0", "target_length: found 0, expected tokens, 1 or more"),
        ("engine: trl\nresume_from_checkpoint: a", "TRL's PPOTrainer can't resume"),
        ("engine: trl\nkl_estimator: k2", "TRL's PPOTrainer has k1 and k3"),
    ],
)
def test_ppos_mistakes_are_told_when_its_config_is_read(write, lines, message):
    resolve_arguments("ppo", write("ppo.yaml", PPO), [])
    with pytest.raises(UserError, match=f"ppo.yaml: .*{message}"):
        resolve_arguments("ppo", write("ppo.yaml", PPO + lines), [])


@pytest.mark.parametrize("lines", ["save_steps: 8", "metric_for_best_model: eval_length\nsave_steps: 4"])
def test_evaluations_that_fit_the_checkpoints(write, lines):
    assert parse_arguments("ppo", write("ppo.yaml", PPO + BEST + lines), []).training.greater_is_better


def test_shares_of_a_run_count_as_steps_do(write):
    text = PPO + BEST.replace("eval_steps: 4", "eval_steps: 0.1") + "save_steps: 0.3\n"
    training = parse_arguments("ppo", write("ppo.yaml", text), []).training
    assert (training.metric_for_best_model, training.save_steps) == ("eval_score", 0.3)
    with pytest.raises(UserError, match=r"save_steps \(0.25\) isn't a multiple of eval_steps \(0.1\)"):
        parse_arguments("ppo", write("ppo.yaml", text), ["--save_steps", "0.25"])


def test_rules_may_do_without_a_reward_model(write):
    lines = PPO.replace("reward_model_path: b\n", "")
    path = write("ppo.yaml", lines + "reward_functions: [hangul, my_rules:polite]\nvalue_model: shared\n")
    assert resolve_arguments("ppo", path, [])["reward_model_path"] is None
    found = resolve_arguments("ppo", path, ["--reward_functions", "ended", "--reward_weights", "0.5"])
    assert (found["reward_functions"], found["reward_weights"]) == (["ended"], [0.5])
    child = write("child.yaml", "extends: with_model.yaml\nreward_model_path: null\n")
    write("with_model.yaml", PPO + "reward_functions: [hangul]\nvalue_model: shared\n")
    assert resolve_arguments("ppo", child, [])["reward_model_path"] is None
    with pytest.raises(UserError, match="value_model: adapter starts as the reward model, and there is none"):
        resolve_arguments("ppo", path, ["--value_model", "adapter"])
    with pytest.raises(UserError, match="'reward_model_path' is not set"):
        resolve_arguments("ppo", write("none.yaml", lines), [])


VALUES = {
    "value_model": "shared",
    "kl_target": 6,
    "kl_horizon": 2000,
    "normalize_scores": True,
    "score_clip": 3,
    "score_after_eos": True,
    "kl_limit": 50,
    "guard_updates": 5,
    "advantages": "rloo",
    "num_generations": 2,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "reward_functions": ["hangul"],
}
BESIDE = {"advantages": {"num_generations": 2}, "eval_strategy": {"eval_files": ["b"], "eval_steps": 1}}
BESIDE |= {"eval_on_start": {"eval_files": ["b"]}}
GROUPS = {"advantages": "grpo", "num_generations": 4}


@pytest.mark.parametrize("key", sorted({*OURS, *VALUES}))
def test_keys_that_trls_engine_would_ignore_are_refused(write, key):
    text = PPO + yaml.safe_dump({key: VALUES[key]} | BESIDE.get(key, {}))
    resolve_arguments("ppo", write("ppo.yaml", text), [])
    with pytest.raises(UserError, match=f"{key}: TRL's PPOTrainer has nothing like it"):
        resolve_arguments("ppo", write("ppo.yaml", text), ["--engine", "trl"])


@pytest.mark.parametrize(("key", "value", "said"), [("use_peft", "false", "LoRA"), ("load_in_8bit", "true", "int8")])
def test_a_base_that_cant_be_divided_is_refused(write, key, value, said):
    path = write("ppo.yaml", PPO)
    divided = ["--shard_base", "true", "--use_peft", "true", "--load_in_8bit", "false"]
    resolve_arguments("ppo", path, divided)
    with pytest.raises(UserError, match=f"shard_base: .*{said}.* set {key}: "):
        resolve_arguments("ppo", path, [*divided, f"--{key}", value])


@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("value_model", "shared"),
        ("vf_coef", 0.5),
        ("cliprange_value", 0.1),
        ("gamma", 0.9),
        ("lam", 0.9),
        ("whiten_rewards", True),
        ("score_after_eos", True),
    ],
)
def test_keys_of_a_value_function_that_is_not_there(write, key, value, method):
    resolve_arguments("ppo", write("ppo.yaml", PPO + yaml.safe_dump({key: value})), [])
    text = PPO + yaml.safe_dump(GROUPS | {"advantages": method, key: value})
    with pytest.raises(UserError, match=f"{key}: has no meaning for advantages: {method}; remove it"):
        resolve_arguments("ppo", write("ppo.yaml", text), [])
    assert resolve_arguments("ppo", write("ppo.yaml", PPO + yaml.safe_dump(GROUPS | {"lam": 1.0})), [])["lam"] == 1


@pytest.mark.parametrize(("key", "value"), [("scale_rewards", "none"), ("loss_type", "grpo")])
def test_keys_of_grpo_are_refused_elsewhere(write, key, value):
    text = PPO + yaml.safe_dump(GROUPS | {key: value})
    assert resolve_arguments("ppo", write("ppo.yaml", text), [])[key] == value
    for method in ("gae", "rloo"):
        with pytest.raises(UserError, match=f"{key}: has no meaning for advantages: {method}"):
            resolve_arguments("ppo", write("ppo.yaml", text), ["--advantages", method])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_generations": 1}, "num_generations: found 1, and advantages: grpo compares"),
        ({"num_generations": 3}, "a rollout of 8 responses .* divide into prompts with 3 responses each"),
        ({"num_generations": 0}, "divide into prompts with 0 responses each"),
        ({"advantages": "gae", "num_generations": 3}, "divide into prompts with 3"),
    ],
)
def test_groups_that_can_not_be(write, changed, words):
    resolve_arguments("ppo", write("ppo.yaml", PPO + yaml.safe_dump(GROUPS)), [])
    with pytest.raises(UserError, match=words):
        resolve_arguments("ppo", write("ppo.yaml", PPO + yaml.safe_dump(GROUPS | changed)), [])


@pytest.mark.parametrize("line", ["pairs: adjacent", "rank_margins: true", "center_rewards_coefficient: 0.1"])
def test_keys_that_mean_nothing_to_the_listwise_loss(write, line):
    resolve_arguments("reward", write("reward.yaml", OTHER + line), [])
    with pytest.raises(UserError, match=f"{line.split(':')[0]}: has no meaning for `loss: listwise`"):
        resolve_arguments("reward", write("reward.yaml", OTHER + line), ["--loss", "listwise"])


@pytest.mark.parametrize(
    ("stage", "line", "message"),
    [
        ("dpo", "loss_type: [ip]", r"loss_type: found 'ip'. Did you mean 'ipo'\?; TRL has sigmoid, hinge"),
        ("dpo", "loss_type: [exo_pair]", "label_smoothing: .* needs one above 0"),
        ("kto", "per_device_train_batch_size: 1", "found 1, expected 2 or more"),
        ("kto", "train_sampling_strategy: random", "found random, expected sequential"),
        ("kto", "loss_type: ipo", "found 'ipo', expected 'kto' or 'apo_zero_unpaired'"),
    ],
)
def test_what_trl_would_say_once_the_models_are_loaded_is_told_before(write, stage, line, message):
    text = "train_files: [a]\nsft_model_path: a\noutput_dir: c\n"
    resolve_arguments(stage, write("run.yaml", text), [])
    with pytest.raises(UserError, match=message):
        resolve_arguments(stage, write("run.yaml", text + line), [])


def test_the_losses_of_pairs_are_those_that_trl_lists():
    said = next(field.metadata["help"] for field in fields(DPOConfig) if field.name == "loss_type")
    assert set(re.findall(r"`'(\w+)'`", said)) == set(DPO_LOSSES)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_evaluation_needs_files(write, stage):
    path = write("run.yaml", OTHER + "eval_strategy: epoch\n")
    with pytest.raises(UserError, match="eval_strategy: found epoch, and there are no eval_files"):
        resolve_arguments(stage, path, [])
    assert resolve_arguments(stage, path, ["--eval_files", "b"])["eval_strategy"] == "epoch"


def test_settings_that_differ(write):
    path = write("run.yaml", OTHER)
    then = yaml.safe_load(yaml.safe_dump(resolve_arguments("sft", path, [])))
    assert changed_setting(then, resolve_arguments("sft", path, []), set()) is None
    other = resolve_arguments("sft", path, ["--learning_rate", "0.5", "--save_steps", "7", "--output_dir", "elsewhere"])
    assert changed_setting(then, other, set()) == "learning_rate"
    # What the hardware chose may differ; what the config says may not.
    on_gpu = then | {"bf16": True, "dtype": "bfloat16", "use_cpu": False}
    assert changed_setting(on_gpu, then, set()) is None
    assert changed_setting(on_gpu, then, {"dtype"}) == "dtype"
