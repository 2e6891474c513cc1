"""A checkpoint of any stage that isn't as it was written is refused by name, and the last whole one is offered."""

import json
import os
import random
import shutil
from pathlib import Path

from kochat_trl.checkpoints import DIGESTS, VERSION, check_checkpoint, fault_of, last_checkpoint, seal
from kochat_trl.errors import UserError
from tests.tiny import ROOT, run_script

import pytest

STAGES = ["sft", "reward", "ppo", "dpo", "kto"]


@pytest.fixture(scope="module")
def command(tiny_base, tiny_sft, tiny_reward, kochatgpt_files):
    """The arguments of two short steps of a stage, each with a checkpoint."""

    def arguments(stage, output, *more):
        file = kochatgpt_files.get(stage, kochatgpt_files["reward"])
        values = {"config": ROOT / f"configs/tiny/{stage}.yaml", "output_dir": output, "train_files": file}
        values |= {"eval_files": file, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
        values |= {"model_name_or_path": tiny_base} if stage in ("sft", "reward") else {"sft_model_path": tiny_sft}
        if stage == "ppo":
            values |= {"reward_model_path": tiny_reward, "num_mini_batches": 1}
            values |= {"total_episodes": 4, "response_length": 4}
        else:
            values |= {"max_steps": 2}
        return [str(word) for key, value in values.items() for word in (f"--{key}", value)] + [*map(str, more)]

    return arguments


@pytest.fixture(scope="module", params=STAGES)
def written(request, command, made_once):
    """A stage, and the folder of a run of it with checkpoint-1 and checkpoint-2."""

    def fill(folder):
        run_script(f"recipes/{request.param}.py", *command(request.param, folder / "run"))

    return request.param, made_once(f"checkpoints-{request.param}", fill) / "run"


@pytest.fixture
def run(written, tmp_path):
    """The same, in a copy of the test's own."""
    stage, folder = written
    return stage, shutil.copytree(folder, tmp_path / "run")


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ rng.randint(1, 255)]) + data[at + 1 :]


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def test_any_file_that_is_changed_or_cut_is_named(run):
    _, output = run
    seed = random.randrange(10**6)
    rng, folder = random.Random(seed), output / "checkpoint-2"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {DIGESTS, "resolved.yaml", "trainer_state.json", "optimizer.pt"} < {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        for spoil in (flip, cut) if data else ():
            path.write_bytes(spoil(data, rng))
            with pytest.raises(UserError) as refused:
                check_checkpoint(folder)
            said = str(refused.value)
            assert said.startswith(f"{folder}: {path.relative_to(folder)} "), (seed, said)
            assert said.endswith(f" --resume_from_checkpoint {output}/checkpoint-1"), (seed, said)
            assert last_checkpoint(output)[0] == output / "checkpoint-1", (seed, path)
        path.unlink()
        assert path.name == DIGESTS or fault_of(folder) == f"{path.relative_to(folder)} is missing"
        path.write_bytes(data)
    check_checkpoint(folder)
    assert last_checkpoint(output) == (folder, [])


def test_it_is_refused_before_a_model_is_looked_for(run, command, recipe, capsys):
    stage, output = run
    weights = next((output / "checkpoint-2").glob("*.safetensors"))
    weights.write_bytes(flip(weights.read_bytes(), random.Random(0)))
    key = "model_name_or_path" if stage in ("sft", "reward") else "sft_model_path"
    nowhere = [f"--{key}", "no/such/model", "--train_files", "no/such/file"]
    with pytest.raises(SystemExit):
        recipe(stage, *command(stage, output, "--resume_from_checkpoint", output / "checkpoint-2", *nowhere))
    assert f"error: {output}/checkpoint-2: {weights.name} isn't as it was written; " in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_checkpoint_without_digests_is_taken_if_it_can_be_read(stage, command, recipe, tmp_path, caplog):
    """As other programs and older versions write it."""
    output = tmp_path / "run"
    recipe(stage, *command(stage, output))
    (output / "checkpoint-1" / DIGESTS).unlink()
    shutil.rmtree(output / "checkpoint-2")
    recipe(stage, *command(stage, output, "--resume_from_checkpoint", output / "checkpoint-1"))
    assert f"checkpoint-1 has no {DIGESTS}: that its files are as they were written can't be told" in caplog.text
    assert (output / "checkpoint-2" / DIGESTS).is_file()


def test_a_checkpoint_without_digests_that_was_cut_is_refused(run):
    """At whatever byte of a file that training goes on with."""
    _, output = run
    rng, folder = random.Random(0), output / "checkpoint-2"
    for path in output.glob(f"*/{DIGESTS}"):
        path.unlink()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".pt", ".pth"):
            data = path.read_bytes()
            path.write_bytes(data.rstrip()[: rng.randrange(len(data.rstrip()))])
            assert fault_of(folder) == f"{path.relative_to(folder)} can't be read: it was cut short, or is none"
            path.write_bytes(data)
    assert fault_of(folder) is None
    for name in ("trainer_state.json", "optimizer.pt"):
        (folder / name).rename(output / name)
        assert fault_of(folder).startswith("has no ")
        (output / name).rename(folder / name)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "value").mkdir(parents=True)
    for name in ("trainer_state.json", "value/weights.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
    seal(folder)
    return folder


def test_another_version_of_the_format_is_told_as_such(folder):
    text = (folder / DIGESTS).read_text(encoding="utf-8")
    (folder / DIGESTS).write_text(text.replace(f'"version": {VERSION}', '"version": 9'), encoding="utf-8")
    with pytest.raises(UserError, match=r"checkpoint-7: digests.json is of version 9 of the format.*start anew"):
        check_checkpoint(folder)


def test_what_is_added_to_a_whole_checkpoint_is_sealed_without_reading_the_rest(folder):
    """A file that was spoiled meanwhile stays one, and one that was written anew is as it is now."""
    for name in ("trainer_state.json", "value/weights.safetensors"):
        (folder / name).write_text("[]", encoding="utf-8")
    old = (folder / DIGESTS).stat().st_mtime - 60
    os.utime(folder / "value/weights.safetensors", (old, old))
    (folder / "notes.txt").touch()
    assert fault_of(folder) == "trainer_state.json isn't as it was written"
    seal(folder)
    assert {*json.loads((folder / DIGESTS).read_text())["files"]} == {
        "notes.txt", "trainer_state.json", "value/weights.safetensors",
    }  # fmt: skip
    assert fault_of(folder) == "value/weights.safetensors isn't as it was written"


def test_a_file_that_a_person_put_there_is_in_nobodys_way(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / ".resolved.yaml.partial").write_text("half")
    assert fault_of(folder) is None
    seal(folder)
    (folder / ".resolved.yaml.partial").unlink()
    assert fault_of(folder) is None


def test_a_checkpoint_that_was_cut_short_is_passed_over(folder):
    """The trainers of transformers write theirs in place: beside those with digests one without is no checkpoint."""
    output = folder.parent
    shutil.copytree(folder, output / "checkpoint-10")
    for name, text in (("trainer_state.json", "{}"), ("optimizer.pt", "x"), ("model.safetensors", "x")):
        Path(output / "checkpoint-12").mkdir(exist_ok=True)
        (output / "checkpoint-12" / name).write_text(text)
    (output / "checkpoint-11").mkdir()
    (output / "checkpoint-13.unfinished").mkdir()
    cut = f"has no {DIGESTS}, which is written last"
    after = [f"checkpoint-12: {cut}", f"checkpoint-11: {cut}"]
    assert last_checkpoint(output) == (output / "checkpoint-10", after)
    assert last_checkpoint(output / "not there") == (None, [])
    for step in (7, 10):
        (output / f"checkpoint-{step}" / DIGESTS).unlink()
    (output / "checkpoint-12/model.safetensors").write_bytes(bytes([2] + [0] * 7) + b"{}")
    (output / "checkpoint-12/optimizer.pt").unlink()
    (output / "checkpoint-12/optimizer.bin").touch()
    assert fault_of(output / "checkpoint-12") is None is last_checkpoint(output)[0]
    (output / "checkpoint-12/resolved.yaml").touch()  # an older version's
    assert last_checkpoint(output) == (output / "checkpoint-12", [])
