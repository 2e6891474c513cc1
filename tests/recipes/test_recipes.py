"""The recipes through the real command line: one process, two processes, and every way to get it wrong."""

import hashlib
import json
import math
import shutil
from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.models.heads import has_score_head
from kochat_trl.models.loading import is_adapter
from kochat_trl.ppo import evaluation
from kochat_trl.ppo.roles import load_roles
from kochat_trl.ppo.stock import build_trainer
from kochat_trl.rows.rows import build_dataset
from kochat_trl.runs.cards import merged_card
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.parse import parse_arguments
from tests.tiny import ROOT, run_script

import pytest
import torch
import trl
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "environment.json",
    "metrics.json",
    "resolved.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
SHORT = {
    "sft": ["--max_steps", "3", "--per_device_train_batch_size", "2", "--logging_steps", "1"],
    "reward": ["--max_steps", "3", "--per_device_train_batch_size", "2", "--logging_steps", "1"],
    "ppo": [
        *["--per_device_train_batch_size", "4", "--num_mini_batches", "2", "--total_episodes", "8"],
        *["--local_rollout_forward_batch_size", "4", "--response_length", "6"],
    ],
}
WATCHED = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true"]


def command(stage, files, tiny_base, output, **paths):
    arguments = ["--config", f"configs/tiny/{stage}.yaml", "--output_dir", str(output), *SHORT[stage]]
    arguments += ["--train_files", files[stage]]
    if stage != "ppo":
        arguments += ["--model_name_or_path", tiny_base, "--eval_files", files[stage]]
    return arguments + [str(x) for key, value in paths.items() for x in (f"--{key}", value)]


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outputs(launch, run_command, tiny_base, kochatgpt_files, made_once):
    """SFT, reward model and PPO on an int8 base, one process each, with any network refused and written down.

    SFT by accelerate's launcher, which takes as long to start as a recipe; the others by themselves.
    """

    def fill(folder):
        for stage in ("sft", "reward", "ppo"):
            paths = ppo_paths(folder) if stage == "ppo" else {}
            arguments = command(stage, kochatgpt_files, tiny_base, folder / stage, **paths)
            done = launch(stage, *arguments) if stage == "sft" else run_command(f"recipes/{stage}.py", *arguments)
            assert done.code == 0, done.text
            assert done.network == ""

    return made_once("outputs", fill)


@pytest.mark.smoke
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_files_written(outputs, stage):
    names = {path.name for path in (outputs / stage).iterdir()}
    assert names == ADAPTER_FILES | ({"samples.jsonl", "value"} if stage == "ppo" else set())
    assert has_score_head(str(outputs / "ppo/value"))


@pytest.mark.smoke
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_what_a_run_says_of_itself(outputs, stage, kochatgpt_files, tiny_base):
    resolved = yaml.safe_load((outputs / stage / "resolved.yaml").read_text(encoding="utf-8"))
    assert resolved["load_in_8bit"] is True
    assert resolved["dtype"] == "float32"
    assert resolved["train_files"] == [kochatgpt_files[stage]]
    environment = read(outputs / stage, "environment.json")
    data = Path(kochatgpt_files[stage])
    assert environment["data_sha256"][str(data)] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (environment["world_size"], environment["seed"]) == (1, 0)
    assert environment["packages"]["trl"] == trl.__version__
    assert 2**27 < environment["peak_ram_bytes"] < 2**35  # torch alone is more than 128 MiB
    assert read(outputs / stage, "metrics.json")["train_runtime"] > 0
    card = (outputs / stage / "README.md").read_text(encoding="utf-8")
    assert f"trained by kochat_trl from `{outputs / 'sft' if stage == 'ppo' else tiny_base}`" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert "base_model" not in head  # it is a folder here
    if stage == "ppo":
        assert f"- reward model `{resolved['reward_model_path']}`" in card
    assert f"- `{data}`, SHA-256 `{hashlib.sha256(data.read_bytes()).hexdigest()}`" in card
    table = [[cell.strip() for cell in line.split("|")[1:3]] for line in card.splitlines() if line.startswith("| ")]
    rows = dict(table)
    assert (rows["load_in_8bit"], rows["use_peft"]) == ("True", "True")
    assert "train_files" not in rows
    result = {"sft": "eval_loss", "reward": "eval_accuracy", "ppo": "objective/scores"}[stage]
    assert float(rows[result]) == pytest.approx(read(outputs / stage, "metrics.json")[result], rel=1e-3)
    assert f"--adapter {outputs / stage} " in card


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_tensorboard_has_what_the_history_has(
    stage, outputs, tiny_base, kochatgpt_files, tmp_path, recipe, monkeypatch
):
    """`report_to` is transformers': every number of the history, at its step, read back from the event file."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    paths = ppo_paths(outputs) if stage == "ppo" else {}
    more = ["--eval_files", kochatgpt_files["ppo"], *WATCHED] if stage == "ppo" else []
    arguments = [*command(stage, kochatgpt_files, tiny_base, tmp_path / "out", **paths), *more]
    recipe(stage, *arguments, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    written = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    history = read(tmp_path / "out", "metrics.json")["history"]
    key = {"sft": "loss", "reward": "accuracy", "ppo": "objective/kl"}[stage]
    expected = {entry["step"]: entry[key] for entry in history if key in entry}
    assert len(expected) >= 2
    found = next(steps for tag, steps in written.items() if tag in (key, f"train/{key}"))
    assert found == pytest.approx(expected, rel=1e-5)
    if stage == "ppo":
        scores = {entry["step"]: entry["eval_score"] for entry in history if "eval_score" in entry}
        assert list(scores) == [0, 1, 2]
        assert written["eval/score"] == pytest.approx(scores, rel=1e-5)


def test_ppos_metrics_are_those_of_the_policy_that_is_kept(
    outputs, kochatgpt_files, tiny_base, tmp_path, recipe, monkeypatch
):
    """The first of two updates, as the second is told to be the worse."""
    inner = evaluation.evaluate

    def worse_each_time(trainer, *rest):
        return inner(trainer, *rest) | {"eval_length": -trainer.state.global_step}

    monkeypatch.setattr(evaluation, "evaluate", worse_each_time)
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "out", **ppo_paths(outputs))
    best = ["--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "true"]
    metric = ["--metric_for_best_model", "eval_length"]
    recipe("ppo", *arguments, "--eval_files", kochatgpt_files["ppo"], *WATCHED, *best, *metric)
    metrics = read(tmp_path / "out", "metrics.json")
    kept = 1
    of_it = [entry for entry in metrics["history"] if entry["step"] == kept]
    assert [("objective/kl" in entry, "eval_score" in entry) for entry in of_it] == [(True, False), (False, True)]
    del metrics["history"], metrics["train_runtime"]
    assert metrics == of_it[0] | of_it[1]
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    checkpoint = load_file(tmp_path / f"out/checkpoint-{kept}/weights.safetensors")
    for name, weight in saved.items():
        there = [w for n, w in checkpoint.items() if n.endswith(name.replace(".weight", ".policy.weight"))]
        assert len(there) == 1
        assert torch.equal(there[0], weight)


def test_the_licence_of_kogpt2_is_in_the_card(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/README.md").write_text("# x\n\n## Made of\n\n- `data.jsonl`\n\n## Load\n\nthe adapter's way")
    card = merged_card(tmp_path / "merged", str(tmp_path / "adapter"), "skt/kogpt2-base-v2", "how to load it")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["base_model"]) == ("cc-by-nc-sa-4.0", "skt/kogpt2-base-v2")
    assert "- `data.jsonl`" in card
    assert "the adapter's way" not in card
    assert "how to load it" in card
    assert "license" not in yaml.safe_load(merged_card(tmp_path, str(tmp_path), "a/b", "X").split("---")[1])


@pytest.mark.smoke
def test_metrics(outputs):
    sft, reward, ppo = (read(outputs / stage, "metrics.json") for stage in ("sft", "reward", "ppo"))
    assert math.isfinite(sft["eval_loss"])
    assert 0 <= reward["eval_accuracy"] <= 1
    for history in (sft["history"], reward["history"]):
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 3
        assert all(0 < loss < 20 for loss in losses)
    updates = [entry for entry in ppo["history"] if "objective/kl" in entry]
    assert len(updates) == 2
    assert updates[0]["objective/kl"] == 0  # before a step the policy is the reference, on int8 too
    assert ppo["objective/scores"] == updates[-1]["objective/scores"]


@pytest.mark.smoke
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_training_moved_the_adapter(outputs, stage):
    """LoRA's B is 0 at the start and A is random: only B tells whether anything was learnt."""
    weights = load_file(outputs / stage / "adapter_model.safetensors")
    moved = [name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 0]
    assert len(moved) == sum("lora_B" in name for name in weights) == 8  # 4 in each of 2 blocks
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert has_score_head(str(outputs / stage)) == (stage == "reward")


@pytest.fixture
def trl_trainer(outputs, tiny_tokenizer, kochatgpt_files, tmp_path):
    """Build TRL's trainer as the recipe does, in this process."""

    def build(*arguments):
        arguments = [*SHORT["ppo"], "--engine", "trl", "--output_dir", str(tmp_path), *arguments]
        args = parse_arguments("ppo", str(ROOT / "configs/tiny/ppo.yaml"), arguments)
        roles = load_roles(str(outputs / "sft"), str(outputs / "reward"), args.model, tiny_tokenizer, share=False)
        prompts, _ = build_dataset([kochatgpt_files["ppo"]], "ppo", tiny_tokenizer)
        return build_trainer(args.resolved, tiny_tokenizer, roles, prompts)

    return build


@pytest.mark.parametrize("rows", [("4", "1"), ("2", "2")], ids=["at once", "accumulated"])
def test_trl_takes_a_step_for_each_minibatch(trl_trainer, rows):
    """num_mini_batches steps in each epoch of each rollout. Given gradient accumulation TRL takes another number."""
    sizes = ["--per_device_train_batch_size", rows[0], "--gradient_accumulation_steps", rows[1]]
    trainer = trl_trainer("--num_ppo_epochs", "3", *sizes)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == 2 * 3 * 2  # rollouts × epochs × minibatches


@pytest.mark.parametrize(("flag", "precision"), [("true", "bf16"), ("false", "no")])
def test_trl_runs_in_the_precision_of_its_arguments(trl_trainer, flag, precision):
    AcceleratorState._reset_state()
    assert trl_trainer("--bf16", flag).accelerator.mixed_precision == precision
    AcceleratorState._reset_state()


def test_a_merge_that_changes_the_model_is_refused(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("kochat_trl.runs.merge.TOLERANCE", -1.0)
    for _ in range(2):
        with pytest.raises(UserError, match=r"a logit of the merged model differs by .* don't use what is in"):
            merge_adapter(str(outputs / "sft"), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.failed", "merged.failed-1"]


def test_merged_policy_opens_with_plain_transformers(outputs, run_command, tmp_path, capsys):
    merged = tmp_path / "merged"
    arguments = ["scripts/merge_lora.py", "--adapter", outputs / "ppo", "--output", merged]
    done = run_command(*arguments)
    assert done.code == 0, done.text
    assert done.network == ""
    assert "largest difference of a logit" in done.text
    names = {path.name for path in merged.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "chat_template.jinja" in names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}

    generator = pipeline("text-generation", model=str(merged))
    turns = [{"role": "user", "content": "대한민국의 수도는 어디인가요?"}]
    reply = generator(turns, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]
    assert reply["role"] == "assistant"
    tokens = generator.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert generator.tokenizer.decode(tokens).replace(" ", "").startswith("###Instruction(명령어):\n대한민국의수도는")
    model = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.tensor([tokens])
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert reply["content"] == generator.tokenizer.decode(greedy, skip_special_tokens=True)

    with pytest.raises(SystemExit) as exit:
        run_script(*arguments)
    assert exit.value.code == 1
    assert f"error: {merged} is not empty" in capsys.readouterr().err


def test_merged_reward_model_keeps_its_head(outputs, tmp_path):
    run_script("scripts/merge_lora.py", "--adapter", outputs / "reward", "--output", tmp_path / "merged")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    head = load_file(outputs / "reward/adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, head)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes(launch, stage, tiny_base, kochatgpt_files, tmp_path):
    output = tmp_path / stage
    arguments = command(stage, kochatgpt_files, tiny_base, output, use_cpu="true")
    done = launch(stage, *arguments, processes=2, offline=True)
    assert done.code == 0, done.text
    assert done.network == ""
    environment = read(output, "environment.json")
    assert (environment["world_size"], environment["backend"]) == (2, "gloo")
    assert {path.name for path in output.iterdir()} == ADAPTER_FILES


def ppo_paths(outputs, **more):
    return {"sft_model_path": outputs / "sft", "reward_model_path": outputs / "reward"} | more


@pytest.mark.smoke
def test_two_processes_of_ppo(launch, outputs, tiny_base, kochatgpt_files, tmp_path):
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **ppo_paths(outputs, use_cpu="true"))
    rows = ["--per_device_train_batch_size", "2", "--total_episodes", "4"]
    done = launch("ppo", *arguments, *rows, processes=2)
    assert done.code == 0, done.text
    assert read(tmp_path / "ppo", "environment.json")["world_size"] == 2


@pytest.mark.slow
def test_trls_engine_is_refused_two_processes(launch, outputs, tiny_base, kochatgpt_files, tmp_path):
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **ppo_paths(outputs, use_cpu="true"))
    refused = launch("ppo", *arguments, "--engine", "trl", processes=2)
    assert refused.code != 0
    assert refused.text.count("error: TRL's PPOTrainer fails under two processes") == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ppo_by_rules_without_a_reward_model(processes, launch, recipe, outputs, tiny_base, kochatgpt_files, tmp_path):
    """Each of two processes asks the rules of its share of the answers; one process is this one."""
    config = tmp_path / "rules.yaml"
    config.write_text(
        f"extends: {ROOT}/configs/tiny/ppo.yaml\nreward_model_path: null\nvalue_model: shared\n"
        "reward_functions: [length, ended]\nreward_weights: [2, 0.5]\ntarget_length: 6\n"
    )
    paths = {"sft_model_path": outputs / "sft", "use_cpu": "true", "config": config}
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **paths)
    arguments += ["--per_device_train_batch_size", str(4 // processes), "--num_mini_batches", "1"]
    if processes == 1:
        recipe("ppo", *arguments)
    else:
        done = launch("ppo", *arguments, processes=processes)
        assert done.code == 0, done.text
    history = [entry for entry in read(tmp_path / "ppo", "metrics.json")["history"] if "objective/kl" in entry]
    assert len(history) == 2
    for entry in history:
        length, ended = entry["rewards/length/mean"], entry["rewards/ended/mean"]
        assert length == pytest.approx(entry["objective/response_tokens"] / 6 - 1)  # none has more than 6
        assert ended == entry["val/num_eos_tokens"] / 4
        missing_eos_penalty = 1 - ended
        assert entry["objective/scores"] == pytest.approx(2 * length + 0.5 * ended - missing_eos_penalty)
    card = (tmp_path / "ppo/README.md").read_text(encoding="utf-8")
    assert "| reward_functions | ['length', 'ended'] |" in card
    assert "reward model" not in card


def test_the_network_guard_guards(run_command):
    """Else `network == ""` would hold for a run that reached out."""
    done = run_command("-c", "import socket; socket.create_connection(('example.com', 80))")
    assert done.code != 0
    assert done.network == "example.com\n"


def test_an_error_through_the_launcher_is_one_screen(run_command, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "configs/accelerate/cpu.yaml"]
    done = run_command(*launcher, "recipes/sft.py", "--config", "configs/tiny/sft.yaml", "--lora_rr", "3")
    assert done.code != 0
    assert "error: command line: unknown --lora_rr. Did you mean 'lora_r'?" in done.text
    assert "Traceback" not in done.text
    assert len(done.text.splitlines()) < 24


# --- In this process from here on, since each start of the libraries takes ten seconds.


def losses(folder):
    return [entry["loss"] for entry in read(folder, "metrics.json")["history"] if "loss" in entry]


def test_resume_goes_on_exactly(recipe, tiny_base, kochatgpt_files, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4"]
    recipe("sft", *command("sft", kochatgpt_files, tiny_base, whole), *saving)
    checkpoint = whole / "checkpoint-2"
    shutil.copytree(checkpoint, stopped / "checkpoint-2")
    resume = ["--resume_from_checkpoint", stopped / "checkpoint-2"]
    recipe("sft", *command("sft", kochatgpt_files, tiny_base, stopped), *saving, *resume)
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(whole)) == 4
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (stopped, whole))
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-4 for name in theirs)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_group_methods_write_no_value_function(recipe, outputs, tiny_base, kochatgpt_files, tmp_path, method):
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / method, **ppo_paths(outputs))
    recipe("ppo", *arguments, "--advantages", method, "--num_generations", "2")
    assert {path.name for path in (tmp_path / method).iterdir()} == ADAPTER_FILES | {"samples.jsonl"}
    first = read(tmp_path / method, "metrics.json")["history"][0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert "loss/value_avg" not in first


def test_overwriting_renames_and_full_training_saves_a_model(recipe, tiny_base, kochatgpt_files, tmp_path):
    """What the old run left must not decide what the next stage loads."""
    output = tmp_path / "sft"
    recipe("sft", *command("sft", kochatgpt_files, tiny_base, output))
    old = (output / "adapter_model.safetensors").read_bytes()
    whole = ["--overwrite_output_dir", "--use_peft", "false", "--load_in_8bit", "false"]
    recipe("sft", *command("sft", kochatgpt_files, tiny_base, output), *whole)
    assert (tmp_path / "sft-1/adapter_model.safetensors").read_bytes() == old
    assert not is_adapter(str(output))
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_base, output))
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_records_left_out_are_listed(recipe, tiny_base, kochatgpt_files, tmp_path, write):
    good = Path(kochatgpt_files["sft"]).read_text(encoding="utf-8-sig")
    files = kochatgpt_files | {"sft": write("sft.jsonl", good.replace('"반가워요"', '""', 1))}
    recipe("sft", *command("sft", files, tiny_base, tmp_path / "out"), "--invalid_records", "skip")
    listed = (tmp_path / "out/data_report.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 2  # once in the training file, once in the held-out one, which is the same here
    assert "(record 3): field 'prompt': found '', expected a non-empty string" in listed[0]


# --- What a user gets wrong.


@pytest.fixture
def fail(recipe, capsys):
    """Run a recipe that must fail; return the error that a user sees."""

    def run_recipe(stage, *arguments):
        with pytest.raises(SystemExit) as exit:
            recipe(stage, *arguments)
        assert exit.value.code == 1
        text = capsys.readouterr().err
        error = text[text.index("error: ") :]
        assert len(error.splitlines()) < 24  # one screen
        return error

    return run_recipe


def test_unknown_key(fail):
    error = fail("sft", "--config", ROOT / "configs/tiny/sft.yaml", "--lora_rr", "3")
    assert error == "error: command line: unknown --lora_rr. Did you mean 'lora_r'?\n"


def test_missing_data_file(fail, tiny_base, kochatgpt_files, tmp_path):
    files = kochatgpt_files | {"sft": "data/kochatgpt/nowhere.jsonl"}
    error = fail("sft", *command("sft", files, tiny_base, tmp_path / "out"))
    assert "data/kochatgpt/nowhere.jsonl: can't be read: No such file or directory" in error


def test_broken_record(fail, tiny_base, kochatgpt_files, tmp_path, write):
    files = kochatgpt_files | {"reward": write("rm.jsonl", '[{"prompt": "가", "chosen": "나"}]')}
    error = fail("reward", *command("reward", files, tiny_base, tmp_path / "out"))
    assert "rm.jsonl, line 1 (record 0): field 'rejected': found None, expected prompt + chosen + rejected" in error
    assert "invalid_records: skip" in error


def test_output_folder_in_use_is_left_alone(fail, tiny_base, kochatgpt_files, tmp_path, write):
    kept = Path(write("out/mine.txt", "months of work"))
    error = fail("sft", *command("sft", kochatgpt_files, tiny_base, kept.parent))
    assert "is not empty. Choose another output folder" in error
    assert kept.read_text() == "months of work"
    assert list(kept.parent.iterdir()) == [kept]


def test_missing_model(fail, kochatgpt_files, tmp_path):
    error = fail("sft", *command("sft", kochatgpt_files, str(tmp_path / "nothing"), tmp_path / "out"))
    assert f"no tokenizer at '{tmp_path}/nothing'" in error


def test_default_config_says_what_to_run_first(fail, monkeypatch, tmp_path):
    """`accelerate launch recipes/ppo.py` with nothing else, in a checkout where no stage has run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    error = fail("ppo")
    assert "there is no folder outputs/kogpt2/sft" in error
    assert "run that first: recipes/sft.py" in error
    assert not (tmp_path / "outputs").exists()


def test_a_rollout_larger_than_the_data(fail, outputs, tiny_base, kochatgpt_files, tmp_path):
    """TRL's own trainer would wait forever."""
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **ppo_paths(outputs))
    for engine in ("kochat", "trl"):
        error = fail("ppo", *arguments, "--per_device_train_batch_size", "64", "--engine", engine)
        assert "6 prompts are fewer than one rollout of 64" in error
        assert not (tmp_path / "ppo").exists()


def test_a_response_longer_than_the_model(fail, outputs, tiny_base, kochatgpt_files, tmp_path):
    arguments = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **ppo_paths(outputs))
    error = fail("ppo", *arguments, "--response_length", "128")
    assert "the model has 128 positions; lower max_prompt_length or response_length" in error
    assert not (tmp_path / "ppo").exists()


def test_a_reward_model_with_another_tokenizer_is_refused(fail, outputs, tiny_base, kochatgpt_files, tmp_path):
    """It would score other tokens than the policy wrote."""
    shutil.copytree(outputs / "reward", tmp_path / "reward")
    tokenizer = read(tmp_path / "reward", "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["가"], vocabulary["나"] = vocabulary["나"], vocabulary["가"]
    (tmp_path / "reward/tokenizer.json").write_text(json.dumps(tokenizer))
    paths = ppo_paths(outputs, reward_model_path=tmp_path / "reward")
    error = fail("ppo", *command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **paths))
    assert "reads other tokens than" in error
    assert not (tmp_path / "ppo").exists()


def test_what_trl_s_ppo_can_not_do(fail, outputs, tiny_base, kochatgpt_files, tmp_path):
    shutil.copytree(outputs / "sft", tmp_path / "sft")
    config = read(tmp_path / "sft", "tokenizer_config.json") | {"pad_token": "</s>"}
    (tmp_path / "sft/tokenizer_config.json").write_text(json.dumps(config))
    base = command("ppo", kochatgpt_files, tiny_base, tmp_path / "ppo", **ppo_paths(outputs, engine="trl"))
    for more, message in {
        ("--sft_model_path", tmp_path / "sft"): "it would never train the end of an answer",
        ("--resume_from_checkpoint", tmp_path): "TRL's PPOTrainer can't resume",
        ("--value_model", "shared"): "value_model: TRL's PPOTrainer has nothing like it",
        ("--kl_estimator", "k2"): "TRL's PPOTrainer has k1 and k3",
    }.items():
        assert message in fail("ppo", *base, *more)


def test_missing_checkpoint(fail, tiny_base, kochatgpt_files, tmp_path):
    arguments = command("sft", kochatgpt_files, tiny_base, tmp_path / "out")
    error = fail("sft", *arguments, "--resume_from_checkpoint", "true")
    assert f"there is no checkpoint true; give a folder such as {tmp_path}/out/checkpoint-100" in error
