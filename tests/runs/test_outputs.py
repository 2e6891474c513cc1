"""What a run leaves behind, in which order, and going on from a checkpoint."""

import shutil
import sys
from pathlib import Path

from kochat_trl.files import last_checkpoint
from kochat_trl.runs import outputs
from tests.tiny import ROOT

import pytest
import yaml
from transformers import Trainer

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
    sft("--resume_from_checkpoint", checkpoint, "--save_total_limit", "3")  # changes nothing that is computed


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
    assert last_checkpoint(out) == out / "checkpoint-1"
    assert f"error: {out}: the disk is full" in (said := capsys.readouterr().err)
    assert f"--resume_from_checkpoint {out}/checkpoint-1 then goes on" in said
    monkeypatch.undo()
    shutil.rmtree(out / "checkpoint-2")
    sft("--resume_from_checkpoint", out / "checkpoint-1")
    assert (out / "metrics.json").is_file()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_default_config_is_found_from_any_folder(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"recipes/{stage}.py"])
    args = outputs.start_run(stage)
    assert args.training.output_dir == f"outputs/kogpt2/{stage}"
