"""What a run leaves behind, in which order, and going on from a checkpoint."""

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from kochat_trl.checkpoints import DIGESTS, last_checkpoint
from kochat_trl.files import PROGRESS
from kochat_trl.runs import outputs
from tests.tiny import ROOT

import pytest
import yaml
from transformers import Trainer, TrainerState

SHORT = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2"]


@pytest.fixture
def sft(recipe, tiny_base, kochatgpt_files, tmp_path):
    """Run SFT with a checkpoint after each of two steps, into `out`."""

    def run(*arguments):
        paths = ["--model_name_or_path", tiny_base, "--train_files", kochatgpt_files["sft"]]
        paths += ["--eval_files", kochatgpt_files["sft"], "--output_dir", str(tmp_path / "out")]
        recipe("sft", "--config", str(ROOT / "configs/tiny/sft.yaml"), *paths, *SHORT, *map(str, arguments))
        return tmp_path / "out"

    return run


def test_going_on_takes_the_settings_it_was_made_with(sft, capsys):
    out = sft()
    checkpoint = out / "checkpoint-1"
    made_with = yaml.safe_load((checkpoint / "resolved.yaml").read_text(encoding="utf-8"))
    assert made_with == yaml.safe_load((out / "resolved.yaml").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit):
        sft("--resume_from_checkpoint", checkpoint, "--learning_rate", "0.5")
    said = capsys.readouterr().err
    assert f"{checkpoint}: was made with learning_rate: {made_with['learning_rate']}, and 0.5 is in force now" in said
    with pytest.raises(SystemExit):
        sft("--resume_from_checkpoint", checkpoint, "--gradient_accumulation_steps", 2)
    assert "was made with gradient_accumulation_steps: 1, and 2 is in force now" in capsys.readouterr().err
    sft("--resume_from_checkpoint", checkpoint, "--save_total_limit", "3")  # changes nothing that is computed
    for number in range(2):  # as two processes leave it
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{number}.pth")
    (checkpoint / DIGESTS).unlink()
    with pytest.raises(SystemExit):
        sft("--resume_from_checkpoint", checkpoint)
    rows = "per_device_train_batch_size · gradient_accumulation_steps · processes"
    assert f"was made with {rows}: 4, and 2 is in force now" in " ".join(capsys.readouterr().err.split())
    sft("--resume_from_checkpoint", checkpoint, "--gradient_accumulation_steps", 2)


def test_the_file_that_says_done_is_written_last(sft, monkeypatch, tmp_path):
    """A kill between two files leaves a run that isn't finished, whichever they are."""
    inner, written = outputs.replace_file, []

    def dies_at_the_last(path, text):
        written.append(path.name)
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        inner(path, text)

    monkeypatch.setattr(outputs, "replace_file", dies_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        sft("--save_strategy", "no")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "metrics.json" not in files
    assert files >= {"adapter_model.safetensors", "tokenizer.json", "resolved.yaml", "environment.json", "README.md"}
    assert written[-1] == "metrics.json"


@pytest.fixture
def told(monkeypatch):
    """What runs write of how far they are, each time that they do."""
    inner, written = outputs.replace_file, []

    def watched(path, text):
        inner(path, text)
        if path.name == PROGRESS:
            written.append(json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail))

    monkeypatch.setattr(outputs, "replace_file", watched)
    return written


def assert_told(told, stage, output, steps):
    """At the start and at each log there is all of the log so far; in the end all is in metrics.json."""
    history = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["history"]
    assert [len(each["history"]) for each in told] == list(range(len(history) + 1))
    assert told[-1]["history"] == history
    assert {(e["stage"], e["host"], e["pid"], e["max_steps"]) for e in told} == {
        (stage, platform.node(), os.getpid(), steps)
    }
    assert [each["step"] for each in told] == [0, *(entry["step"] for entry in history)]
    assert not (output / PROGRESS).exists()


def test_a_run_tells_how_far_it_is(sft, told):
    out = sft("--logging_steps", "1")
    assert_told(told, "sft", out, steps=2)
    assert len(told) == 5  # at the start, two losses, all together, and the held-out loss


@pytest.mark.parametrize("engine", ["kochat", "trl"])
def test_ppo_tells_how_far_it_is(recipe, tiny_sft, tiny_reward, kochatgpt_files, told, tmp_path, engine):
    values = {"config": ROOT / "configs/tiny/ppo.yaml", "sft_model_path": tiny_sft, "reward_model_path": tiny_reward}
    values |= {"train_files": kochatgpt_files["ppo"], "load_in_8bit": "false", "output_dir": tmp_path / "ppo"}
    values |= {"per_device_train_batch_size": 4, "num_mini_batches": 1, "total_episodes": 8, "response_length": 4}
    recipe("ppo", *(str(word) for name, value in values.items() for word in (f"--{name}", value)), "--engine", engine)
    assert_told(told, "ppo", tmp_path / "ppo", steps=2)
    assert len(told) == 3


def test_a_run_that_goes_on_tells_no_step_twice(sft, told, monkeypatch, tmp_path):
    """And one that broke off leaves how far it came."""
    inner = Trainer.training_step

    def breaks_off(self, *arguments, **settings):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return inner(self, *arguments, **settings)

    monkeypatch.setattr(Trainer, "training_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        sft("--logging_steps", "1")
    assert json.loads((tmp_path / "out" / PROGRESS).read_text(encoding="utf-8")) == told[-1]
    assert (told[-1]["step"], len(told)) == (1, 2)
    monkeypatch.setattr(Trainer, "training_step", inner)
    told.clear()
    out = sft("--logging_steps", "1", "--resume_from_checkpoint", tmp_path / "out/checkpoint-1")
    assert [[log["step"] for log in each["history"] if "loss" in log] for each in told] == [[1], *[[1, 2]] * 3]
    assert not (out / PROGRESS).exists()


def test_a_run_that_broke_off_before_it_saved_is_started_again_as_it_was(sft, monkeypatch, tmp_path):
    inner = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *unused, **none: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sft("--save_strategy", "no")
    monkeypatch.setattr(Trainer, "training_step", inner)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PROGRESS]
    assert (sft("--save_strategy", "no") / "metrics.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def tell(log_history, folder, step=7):
    """What a run has told that logged so."""
    state = TrainerState(is_world_process_zero=True, global_step=step, max_steps=9, log_history=log_history)
    outputs.ShowProgress("kto").on_log(SimpleNamespace(output_dir=str(folder)), state, None)
    file = folder / PROGRESS
    return json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail) if file.exists() else None


def test_numbers_that_json_has_not_are_null(tmp_path):
    logs = [{"loss": float("nan"), "kl": float("-inf"), "grad_norm": 2.5, "step": 7}]
    assert tell(logs, tmp_path)["history"] == [{"loss": None, "kl": None, "grad_norm": 2.5, "step": 7}]


def test_a_long_log_is_told_more_rarely(tmp_path):
    lengths = [1, 498, 499, 500, 501, 502, 999, 1000, 1001, 1002, 1003, 1004, 1005]
    written = [n for n in lengths if tell([{"step": i} for i in range(n)], tmp_path, n)["step"] == n]
    assert written == [1, 498, 499, 500, 502, 1002, 1005]


def test_a_run_goes_on_where_it_cannot_tell_how_far_it_is(tmp_path):
    assert tell([], tmp_path / "not there") is None


def test_a_disk_that_fills_up_while_training(sft, tmp_path, capsys, monkeypatch):
    """What can't be written is told with the folder, and the checkpoint before it goes on."""
    inner = Trainer._save_optimizer_and_scheduler

    def save(self, folder):
        if self.state.global_step == 2:
            Path(folder, "optimizer.pt").symlink_to("/dev/full")
        inner(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(SystemExit):
        sft()
    out = tmp_path / "out"
    assert last_checkpoint(out)[0] == out / "checkpoint-1"
    assert f"error: {out}: the disk is full" in (said := capsys.readouterr().err)
    assert f"--resume_from_checkpoint {out}/checkpoint-1 then goes on" in said
    monkeypatch.undo()
    shutil.rmtree(out / "checkpoint-2")
    sft("--resume_from_checkpoint", out / "checkpoint-1")
    assert (out / "metrics.json").is_file()


def test_older_checkpoints_are_dropped_when_the_new_one_is_whole(sft, monkeypatch, tmp_path):
    def seal(folder):
        assert folder.name == "checkpoint-1" or (folder.parent / "checkpoint-1").is_dir()
        inner(folder)

    inner = outputs.seal
    monkeypatch.setattr(outputs, "seal", seal)
    out = sft("--save_total_limit", "1")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "save_total_limit: 1\n" in (out / "resolved.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_default_config_is_found_from_any_folder(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"recipes/{stage}.py"])
    args = outputs.start_run(stage)
    assert args.training.output_dir == f"outputs/kogpt2/{stage}"
