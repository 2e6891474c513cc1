"""DPO and KTO through the real command line, on an int8 base: what is written, and where a run goes on."""

import json
import math
import shutil

from kochat_trl.models.loading import ADAPTER_WEIGHTS
from kochat_trl.runs.merge import merge_adapter
from tests.recipes.test_recipes import ADAPTER_FILES

import pytest
import torch
from safetensors.torch import load_file

STAGES = ("dpo", "kto")


@pytest.fixture
def command(tiny_sft, kochatgpt_files):
    def arguments(stage, output, *more):
        config = ["--config", f"configs/tiny/{stage}.yaml", "--output_dir", output, "--sft_model_path", tiny_sft]
        files = ["--train_files", kochatgpt_files["reward"], "--eval_files", kochatgpt_files["reward"]]
        rows = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1]
        return [str(word) for word in (*config, *files, *rows, *more)]

    return arguments


def history(folder, key):
    entries = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.smoke
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_sft_s_adapter_trained_on(stage, recipe, command, tiny_sft, tmp_path):
    """The policy alone: the reference is what SFT left already. It merges as any adapter does."""
    output = tmp_path / stage
    recipe(stage, *command(stage, output))
    assert {path.name for path in output.iterdir()} == ADAPTER_FILES
    before, after = (load_file(f"{folder}/{ADAPTER_WEIGHTS}") for folder in (tiny_sft, output))
    assert before.keys() == after.keys()
    assert all(0 < (after[name] - before[name]).abs().max() < 0.01 for name in before)
    losses = history(output, "loss")
    if stage == "dpo":
        assert losses[0] == pytest.approx(math.log(2), rel=1e-6)  # the policy is the reference before a step
        assert losses[-1] < losses[0]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"{stage.upper()} LoRA adapter, trained by kochat_trl from `{tiny_sft}`" in card
    assert f"- {stage}\n" in card
    merge_adapter(str(output), tmp_path / "merged")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("every", [1, 3])
def test_resume_goes_on_exactly(stage, every, recipe, command, tmp_path):
    """From the same reference, which no checkpoint holds, and also with a log that is of steps before and after."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--logging_steps", every]
    recipe(stage, *command(stage, whole, *saving))
    assert not (whole / "checkpoint-2/ref").exists()
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    recipe(stage, *command(stage, stopped, *saving, "--resume_from_checkpoint", stopped / "checkpoint-2"))
    for key in ("loss", "train_loss", "num_tokens", "eval_loss", "rewards/chosen"):
        assert history(stopped, key) == history(whole, key) != [], key
    ours, theirs = (load_file(folder / ADAPTER_WEIGHTS) for folder in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_launcher_runs_it(stage, processes, launch, command, tiny_sft, tmp_path):
    output = tmp_path / stage
    done = launch(stage, *command(stage, output, "--use_cpu", "true"), processes=processes)
    assert (done.code, done.network) == (0, ""), done.text
    assert json.loads((output / "environment.json").read_text())["world_size"] == processes
    before, after = (load_file(f"{folder}/{ADAPTER_WEIGHTS}") for folder in (tiny_sft, output))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_what_sft_has_settled_is_refused(recipe, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe("dpo", *command("dpo", tmp_path / "out", "--lora_r", 32))
    assert "lora_r: has no effect: the run goes on with the adapter in" in capsys.readouterr().err
