"""YAML and command line → typed arguments, and what is refused."""

from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.settings.keys import ON_SFT, UNUSED, ModelArguments
from kochat_trl.settings.parse import choose_precision, folder_of, parse_arguments
from tests.tiny import ROOT

import huggingface_hub
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
BASE = "train_files: [a.jsonl]\nlearning_rate: 1e-5\nlora_r: 4\n"
MODELS = {"ppo": "sft_model_path: a\nreward_model_path: b\n"} | dict.fromkeys(("dpo", "kto"), "sft_model_path: a\n")


def parse(write, text, *argv, stage="sft"):
    write("base.yaml", BASE + MODELS.get(stage, "model_name_or_path: a\n"))
    return parse_arguments(stage, write("run.yaml", text), list(argv))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_is_parsed_by_the_real_parser(path):
    if path.parent.name == "accelerate":
        assert load_config_from_file(str(path)).num_processes >= 1
        return
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    experiment = path.parent.name in ("bases", "experiments")
    assert ("kochat run configs/" if experiment else "accelerate launch recipes/") in text
    for stage in UNUSED if experiment else [path.stem]:
        args = parse_arguments(stage, str(path), [])
        assert args.training.output_dir.startswith("outputs/")
        assert args.training.report_to == []


def test_configs_are_there():
    names = {f"{p.parent.name}/{p.name}" for p in CONFIGS}
    assert {f"{size}/{stage}.yaml" for size in ("tiny", "kogpt2") for stage in UNUSED} <= names
    assert {f"accelerate/{name}.yaml" for name in ("cpu", "one_gpu", "ddp")} <= names
    assert any(name.startswith("experiments/") for name in names)


# --- A file for all stages


@pytest.fixture
def stages(write):
    """A folder with a file for each stage, which a file beside it may extend."""
    for stage in UNUSED:
        lines = [
            BASE if stage not in ON_SFT else BASE.replace("lora_r: 4\n", ""),
            MODELS.get(stage, "model_name_or_path: a\n"),
        ]
        write(f"set/{stage}.yaml", "".join(lines))
    return lambda stage, text: parse_arguments(stage, write("all.yaml", f"extends: set\n{text}"), [])


def test_each_stage_takes_its_own_keys_of_a_file_for_all(stages):
    text = "model_name_or_path: b\npairs: adjacent\nkl_coef: 0.5\nlearning_rate: 1e-3\nlora_r: 2\n"
    for stage in ("sft", "reward"):
        args = stages(stage, text)
        assert (args.model.model_name_or_path, args.training.learning_rate, args.model.lora_r) == ("b", 1e-3, 2)
        assert args.recipe.pairs == ("adjacent" if stage == "reward" else "all")
    args = stages("ppo", text)
    assert (args.training.kl_coef, args.training.learning_rate, args.training.sft_model_path) == (0.5, 1e-3, "a")
    assert args.model.lora_r == ModelArguments().lora_r  # PPO goes on with SFT's adapter
    for stage in ("dpo", "kto"):
        args = stages(stage, text)
        assert (args.training.learning_rate, args.training.sft_model_path) == (1e-3, "a")
        assert args.recipe.pairs == ("adjacent" if stage == "dpo" else "all")
        assert args.model.lora_r == ModelArguments().lora_r


def test_a_file_for_all_stages_may_extend_another(stages, write):
    stages("sft", "pairs: adjacent\nkl_coef: 0.5\n")
    child = write("child.yaml", "extends: all.yaml\nloss: all_pairs\nkl_coef: 0.7\n")
    args = parse_arguments("reward", child, [])
    assert (args.recipe.pairs, args.recipe.loss) == ("adjacent", "all_pairs")
    assert parse_arguments("ppo", child, []).training.kl_coef == 0.7
    assert folder_of(Path(child)) == Path(child).parent / "set"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_key_of_no_stage_is_refused_in_a_file_for_all(stages, stage):
    with pytest.raises(UserError, match=r"all\.yaml, line 2: unknown key 'kl_coeff'"):
        stages(stage, "kl_coeff: 1\n")
    with pytest.raises(UserError, match=r"all\.yaml: 'push_to_hub' has no effect"):
        stages(stage, "push_to_hub: true\n")


@pytest.mark.parametrize("key", ["train_files", "eval_files"])
def test_a_file_for_all_stages_names_no_data(stages, key):
    with pytest.raises(UserError, match=rf"all\.yaml, line 2: key '{key}' is for one stage"):
        stages("sft", f"{key}: [b.jsonl]\n")


def test_the_key_of_another_stage_is_refused_in_the_file_of_one(write):
    with pytest.raises(UserError, match="unknown key 'kl_coef'"):
        parse(write, "extends: base.yaml\nkl_coef: 0.5\n")


def test_a_folder_is_a_config_and_the_file_of_a_stage_extends_none(write, stages):
    stages("sft", "")
    folder = Path(write("set/x", "")).parent
    assert parse_arguments("sft", str(folder), []).training.learning_rate == 1e-5
    assert folder_of(folder) == folder
    with pytest.raises(UserError, match=r"sft\.yaml: expected a folder with sft\.yaml"):
        folder_of(folder / "sft.yaml")


# --- The file of one stage


def test_precedence(write):
    text = "extends: base.yaml\nlora_r: 8\n"
    assert parse(write, text).model.lora_alpha == 32  # class
    assert parse(write, text).training.learning_rate == 1e-5  # parent
    assert parse(write, text).model.lora_r == 8  # file
    assert parse(write, text, "--lora_r", "16").model.lora_r == 16  # command line
    other = write("other.yaml", "extends: base.yaml\nlora_r: 2\n")
    assert parse(write, text, "--config", other).model.lora_r == 2


def test_extends_is_relative_to_the_file_and_goes_on(write):
    write("deep/er/c.yaml", "extends: ../b.yaml\nlora_r: 3\n")
    write("deep/b.yaml", "extends: ../base.yaml\nlora_alpha: 7\n")
    args = parse(write, "extends: deep/er/c.yaml\n")
    assert (args.model.lora_r, args.model.lora_alpha, args.training.learning_rate) == (3, 7, 1e-5)


@pytest.mark.parametrize("stage", UNUSED)
def test_resolved_is_a_config_again(write, stage):
    args = parse(write, "extends: base.yaml\noutput_dir: x\nload_in_8bit: true\n", "--seed", "3", stage=stage)
    again = parse_arguments(stage, write("again.yaml", yaml.safe_dump(args.resolved)), [])
    assert again.resolved == args.resolved
    assert (again.training.seed, again.training.learning_rate, again.model.load_in_8bit) == (3, 1e-5, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lerning_rate: 1", "run.yaml, line 2: unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("num_ppo_epochs: 1", "unknown key 'num_ppo_epochs'"),  # PPO's, not SFT's
        ("lora_r: [3]", r"line 2: key 'lora_r': found \[3\], expected int"),
        ("lora_r: 2.5", "key 'lora_r': found 2.5, expected int"),
        ("lora_r: true", "key 'lora_r': found True, expected int"),
        ("learning_rate: [3]", r"key 'learning_rate': found \[3\], expected float"),
        ("learning_rate: fast", "key 'learning_rate': found 'fast', expected float"),
        ("load_in_8bit: 'yes'", "key 'load_in_8bit': found 'yes', expected bool"),
        ("train_files: a.jsonl", r"key 'train_files': found 'a.jsonl', expected list\[str\]"),
        ("invalid_records: maybe", "found 'maybe', expected 'error' or 'skip'"),
        ("max_length: long", "key 'max_length': found 'long', expected int or null"),
        ("save_strategy: sometimes", "key 'save_strategy': found 'sometimes', expected 'no' or 'steps'"),
        ("load_in_8bit: true\nload_in_4bit: true", "8 bit and 4 bit precision at the same time"),
        ("dtype: half", "key 'dtype': found 'half', expected 'auto' or"),
        ("hub_token: secret", "'hub_token' has no effect in these recipes"),
        ("lora_r: 1\nlora_r: 2", "line 3: key 'lora_r' is set twice"),
        ("lora_r: [", "broken YAML"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    with pytest.raises(UserError, match=message):
        parse(write, f"extends: base.yaml\n{line}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], r"unknown --lerning_rate. Did you mean 'learning_rate'?"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--lora", "3"], "unknown --lora"),  # no abbreviations
        (["--config"], "argument --config: expected one argument"),
        (["--config=nowhere.yaml"], "nowhere.yaml: can't read this config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: can't read this config: No such file"),
    ],
)
def test_a_bad_command_line_is_named(write, argv, message):
    with pytest.raises(UserError, match=message):
        parse(write, "extends: base.yaml\n", *argv)


def test_files_that_make_no_config(write):
    with pytest.raises(UserError, match="extends itself"):
        parse(write, "extends: run.yaml\n")
    with pytest.raises(UserError, match="expected lines of `key: value`"):
        parse(write, "- a\n")
    with pytest.raises(UserError, match="'reward_model_path' is not set"):
        parse(write, "train_files: [a]\nsft_model_path: a\n", stage="ppo")  # and not TRL's own default
    with pytest.raises(UserError, match=r"required: --train_files.*in the config or on the command line"):
        parse(write, "lora_r: 4\n")


CHOICES = {"use_cpu": False, "bf16": None, "fp16": False, "dtype": None, "use_peft": True}


@pytest.mark.parametrize(
    ("gpu", "ampere", "given", "expected"),
    [
        (False, False, {}, {"use_cpu": True, "bf16": False, "fp16": False, "dtype": "float32"}),
        (True, True, {}, {"use_cpu": False, "bf16": True, "fp16": False, "dtype": "bfloat16"}),
        (True, False, {}, {"use_cpu": False, "bf16": False, "fp16": True, "dtype": "float16"}),
        (True, True, {"use_peft": False}, {"bf16": True, "dtype": "float32"}),
        (True, True, {"use_cpu": True}, {"use_cpu": True, "bf16": False, "dtype": "float32"}),
        (True, True, {"fp16": True}, {"bf16": False, "fp16": True, "dtype": "float16"}),
        (True, True, {"bf16": False}, {"bf16": False, "fp16": False, "dtype": "float32"}),
        (True, True, {"dtype": "float32"}, {"bf16": True, "dtype": "float32"}),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, gpu, ampere, given, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: ampere)
    values = CHOICES | given
    choose_precision(values)
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("given", ["dtype: float32", ""])
def test_a_dtype_in_the_file_is_kept(write, monkeypatch, given):
    """Also the one that is TRL's default, on hardware that would choose another."""
    monkeypatch.setattr("kochat_trl.settings.parse.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("kochat_trl.settings.parse.torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    args = parse(write, f"extends: base.yaml\nuse_peft: true\n{given}\n")
    assert args.model.dtype == ("float32" if given else "bfloat16")


@pytest.mark.parametrize("line", ["max_steps: 3", "model_name_or_path: a"])
def test_keys_that_ppo_never_reads(write, line):
    with pytest.raises(UserError, match=f"'{line.split(':')[0]}' has no effect in recipes/ppo.py"):
        parse(write, f"extends: base.yaml\n{line}\n", stage="ppo")


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("line", ["model_name_or_path: a", "sync_ref_model: true", "loss: listwise"])
def test_keys_that_dpo_and_kto_never_read(write, line, stage):
    with pytest.raises(UserError, match=f"'{line.split(':')[0]}' has no effect in recipes/{stage}.py"):
        parse(write, f"extends: base.yaml\n{line}\n", stage=stage)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("line", ["loss: listwise", "pairs: adjacent", "rank_margins: true", "ranking_order: rank_of"])
def test_keys_of_the_reward_model_are_refused_elsewhere(write, line, stage):
    key, value = line.split(": ")
    with pytest.raises(UserError, match=f"'{key}' has no effect in recipes/{stage}.py"):
        parse(write, f"extends: base.yaml\n{line}\n", stage=stage)
    args = parse(write, f"extends: base.yaml\n{line}\n", stage="reward")
    assert str(getattr(args.recipe, key)).lower() == value


def test_defaults_are_quiet(write):
    args = parse(write, "extends: base.yaml\n")
    assert args.training.report_to == []
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
