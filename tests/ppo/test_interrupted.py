"""PPO runs that are stopped and killed, and runs on two processes: real processes, the real recipe."""

import json
import os
import random
import signal
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from kochat_trl.models.loading import load_causal_lm
from tests.tiny import random_adapter, run_script

import pytest
from safetensors.torch import load_file

KILLS = int(os.environ.get("KOCHAT_KILLS", "3"))
UPDATES = 8
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.ppo", "transformers.models.gpt2.modeling_gpt2", __name__])
WRITTEN = ["adapter_model.safetensors", "value/adapter_model.safetensors", "samples.jsonl"]


@pytest.fixture(scope="module")
def sft(tiny_base, tiny_tokenizer, made_once) -> str:
    """An SFT adapter that is tamer than `tiny_sft`, on which a rounding grows over updates until a token is another."""
    fill = random_adapter(load_causal_lm, tiny_base, tiny_tokenizer, seed=0, scale=0.05)
    return str(made_once("tame-sft", fill))


@pytest.fixture(scope="module")
def arguments(sft, tiny_reward, kochatgpt_files) -> list[str]:
    values = {"config": "configs/tiny/ppo.yaml", "sft_model_path": sft, "reward_model_path": tiny_reward}
    values |= {"train_files": kochatgpt_files["ppo"], "load_in_8bit": "false", "dtype": "float32"}
    values |= {"per_device_train_batch_size": 4, "num_mini_batches": 2, "total_episodes": 4 * UPDATES}
    values |= {"response_length": 8, "learning_rate": "5e-3", "lr_scheduler_type": "linear", "normalize_scores": "true"}
    values |= {"kl_target": 0.5, "kl_horizon": 100, "save_strategy": "steps", "save_steps": 1}
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def start(arguments: list[str], output: Path, *more: object) -> BaseProcess:
    """The recipe in a process forked from one that has the libraries imported already: it starts at once."""
    process = FORKS.Process(target=run_ppo, args=([*arguments, "--output_dir", output, *more], log_of(output)))
    process.start()
    return process


def run_ppo(arguments: list[object], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_script("recipes/ppo.py", *arguments)


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def finish(process: BaseProcess, output: Path, code: int = 0) -> str:
    """What it printed."""
    process.join(timeout=300)
    text = log_of(output).read_text(encoding="utf-8")
    assert process.exitcode == code, text
    return text


def last_checkpoint(output: Path) -> int:
    return max((int(path.name[11:]) for path in output.glob("checkpoint-*") if path.name[11:].isdigit()), default=0)


def wait_for(condition, process: BaseProcess) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(arguments, run_command, made_once) -> Path:
    """A run in an interpreter of its own, so that hashes, and the order of sets, are others than in the runs below."""

    def fill(folder):
        done = run_command("recipes/ppo.py", *arguments, "--output_dir", str(folder / "ppo"))
        assert done.code == 0, done.text
        assert last_checkpoint(folder / "ppo") == UPDATES

    return made_once("unbroken", fill) / "ppo"


def assert_same_files(output: Path, unbroken: Path) -> None:
    for name in WRITTEN:
        assert (output / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_sigterm_leaves_a_checkpoint_to_go_on_from(arguments, unbroken, tmp_path):
    output = tmp_path / "ppo"
    rarely = ["--save_steps", 1000]  # no checkpoint but the one of the signal
    process = start(arguments, output, *rarely)
    wait_for((output / "samples.jsonl").exists, process)
    process.terminate()
    text = finish(process, output, 128 + signal.SIGTERM)
    step = last_checkpoint(output)
    assert 0 < step < UPDATES
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert f"--resume_from_checkpoint {output}/checkpoint-{step}" in " ".join(text.split())
    assert not (output / WRITTEN[0]).exists()
    resumed = start(arguments, output, *rarely, "--resume_from_checkpoint", output / f"checkpoint-{step}")
    finish(resumed, output)
    assert_same_files(output, unbroken)


def test_killed_at_any_moment(arguments, unbroken, tmp_path):
    rng = random.Random(0)
    attempt, output, kills, resume = 0, tmp_path / "0", 0, []
    while (process := start(arguments, output, *resume)) and kills < KILLS:
        # In the rollout, the steps or the checkpoint of one of the next updates.
        before, further = last_checkpoint(output), rng.randint(0, 2)
        seen = (output / "samples.jsonl").stat().st_size if resume else 0

        def going(output=output, before=before, further=further, seen=seen) -> bool:
            file = output / "samples.jsonl"
            return last_checkpoint(output) >= before + further and file.exists() and file.stat().st_size != seen

        wait_for(going, process)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join(timeout=300)
        if process.exitcode != -signal.SIGKILL:  # it was done first
            break
        kills += 1
        if last := last_checkpoint(output):
            resume = ["--resume_from_checkpoint", output / f"checkpoint-{last}"]
        else:
            attempt += 1
            output, resume = tmp_path / str(attempt), []
    finish(process, output)
    assert kills > 0
    assert_same_files(output, unbroken)
    assert last_checkpoint(output) == UPDATES
    assert not list(output.glob("*.unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gae", "grpo", "rloo"])
def test_two_processes_learn_what_one_does(launch, arguments, sft, tiny_reward, tmp_path, method):
    # Three small updates of SGD: Adam, or a step that clips many ratios, blows a rounding of the sums up, and a later
    # update may then sample another token.
    arguments = [*arguments, "--optim", "sgd", "--learning_rate", "0.005", "--max_grad_norm", "0"]
    arguments += ["--total_episodes", "12", "--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "1"]
    arguments += ["--eval_files", arguments[arguments.index("--train_files") + 1]]
    if method != "gae":  # each process has one answer to each of the two prompts
        arguments += ["--advantages", method, "--num_generations", "2", "--kl_estimator", "k3"]
    if method == "rloo":  # and one step an update, from the pass that scored
        arguments += ["--num_ppo_epochs", "1", "--num_mini_batches", "1"]
    finish(start(arguments, tmp_path / "one"), tmp_path / "one")
    more = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two"), "--use_cpu", "true"]
    done = launch("ppo", *arguments, *more, processes=2)
    assert done.code == 0, done.text
    assert json.loads((tmp_path / "two/environment.json").read_text(encoding="utf-8"))["world_size"] == 2
    origins = {WRITTEN[0]: sft} | ({WRITTEN[1]: tiny_reward} if method == "gae" else {})
    for name, origin in origins.items():
        paths = Path(origin) / WRITTEN[0], tmp_path / "one" / name, tmp_path / "two" / name
        begun, one, two = map(load_file, paths)
        largest = max(float((one[key] - begun[key]).abs().max()) for key in begun)
        assert largest > 1e-3
        for key in begun:
            assert float((two[key] - one[key]).abs().max()) <= 1e-3 * largest, key
    found = [json.loads((tmp_path / name / "metrics.json").read_text())["history"] for name in ("one", "two")]
    scores, expected = ([entry["eval_score"] for entry in history if "eval_score" in entry] for history in found)
    assert scores == pytest.approx(expected, rel=1e-3)
    assert len(scores) == 3
