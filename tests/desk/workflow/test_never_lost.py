"""`kochat run` killed by SIGKILL at any moment of any stage, again and again, leaves what an unbroken run leaves.

The processes are real, each recipe in a group of its own, as `kochat run` starts it. Most are forked from one that has
the libraries imported, as a start takes seconds; every tenth run is the true command. A kill is of all processes of the
run, in a drawn order.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from kochat_trl.desk.workflow import pipeline
from tests.tiny import ROOT, run_script

import pytest
import yaml

KILLS = int(os.environ.get("KOCHAT_KILLS", "30"))
FORKS = get_context("forkserver")
PRELOADED = ["recipes.sft", "recipes.reward", "recipes.ppo", "kochat_trl.runs.merge", "kochat_trl.desk.workflow.report"]
PRELOADED += ["kochat_trl.cli.main", "kochat_trl.desk.evaluation.scoring", "transformers.models.gpt2.modeling_gpt2"]
# Where a run is killed: so many seconds at most after such a file has appeared, or one of a later line.
TRAINING = [("progress.json", 0.5), ("progress.json", 0.5), ("checkpoint-*", 0.02), ("checkpoint-*/optimizer.pt", 0.01)]
TRAINING += [("checkpoint-*/trainer_state.json", 0.01), ("checkpoint-*", 0.2)]
SAVING = [("adapter_model.safetensors", 0.05), ("README.md", 0.01)]
MOMENTS = [(f"sft/{file}", late) for file, late in TRAINING + SAVING]
MOMENTS += [(f"reward/{file}", late) for file, late in [*TRAINING, *SAVING, ("evaluation", 0.1)]]
MOMENTS += [(f"ppo/{file}", late) for file, late in [*TRAINING, ("checkpoint-*.unfinished", 0.02), *SAVING]]
MOMENTS += [("merged.unfinished", 0.05), ("merged.unfinished/*", 0.1), ("merged", 0.1), ("report/report.json", 0.01)]


class Forked:
    """In place of `subprocess.Popen` in `kochat run`: what the command would run, in a fork of this process."""

    def __init__(self, command, start_new_session):
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setsid()
                number = next(i for i, word in enumerate(command) if word.endswith(".py") or word.endswith(".main"))
                path, words = command[number], command[number + 1 :]
                run_script("kochat_trl/cli/main.py" if path.endswith(".main") else os.path.relpath(path, ROOT), *words)
                code = 0
            except SystemExit as exit:
                code = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_forked(folder, log):
    os.setsid()
    os.chdir(folder)
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    pipeline.subprocess = SimpleNamespace(Popen=Forked)
    run_script("kochat_trl/cli/main.py", "run", "set")


class Run:
    """A `kochat run`, and all that it starts."""

    def __init__(self, folder, forked=True):
        self.log = folder / "log.txt"
        if forked:
            self.process = FORKS.Process(target=run_forked, args=(folder, self.log))
            self.process.start()
        else:
            command = [sys.executable, "-m", "kochat_trl.cli.main", "run", "set"]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            with self.log.open("a") as file:
                output = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": folder, "env": environment}
                self.process = subprocess.Popen(command, start_new_session=True, **output)
        self.pid = self.process.pid

    def code(self):
        return self.process.exitcode if hasattr(self.process, "exitcode") else self.process.poll()

    def ended(self):
        while self.code() is None:
            time.sleep(0.05)
        return self.code()

    def kill(self, rng):
        """All processes of it: those that descend from it, in a drawn order; stopped first, so that none gets away."""
        family = {self.pid}
        while True:
            for pid in family:
                send(pid, signal.SIGSTOP)
            children = {pid for pid, parent in parents().items() if parent in family}
            if children <= family:
                break
            family |= children
        for pid in rng.sample(sorted(family), len(family)):
            send(pid, signal.SIGKILL)
        while family & parents().keys():
            self.code()
            time.sleep(0.005)


def send(pid, number):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def parents():
    """The parent of each process that runs."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = file.read_text().rpartition(")")[2].split()
            found |= {int(file.parent.name): int(parent)} if state not in "ZX" else {}
    return found


def there(output, patterns):
    """What is under these names, each with when it was made."""
    found = set()
    for path in {path for pattern in patterns for path in output.glob(pattern)}:
        with suppress(OSError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def write_set(folder, tiny_base, files):
    """Configs of six steps a stage, with a checkpoint after each."""
    common = {"use_peft": True, "use_cpu": True, "report_to": "none", "logging_steps": 1, "seed": 0}
    common |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 2}
    common |= {"dtype": "float32", "learning_rate": 1e-3}
    sft = {"model_name_or_path": tiny_base, "max_steps": 6, "lora_r": 4}
    stages = {"sft": sft, "reward": sft | {"eval_files": [files["reward"]]}}
    stages["ppo"] = {"sft_model_path": "out/sft", "reward_model_path": "out/reward", "num_mini_batches": 1}
    stages["ppo"] |= {"total_episodes": 12, "response_length": 4}
    (folder / "set").mkdir(parents=True)
    for stage, values in stages.items():
        values = values | common | {"output_dir": f"out/{stage}", "train_files": [files[stage]]}
        (folder / f"set/{stage}.yaml").write_text(yaml.safe_dump(values))


def without_times(value):
    """The same without what a clock says."""
    if isinstance(value, list):
        return [without_times(each) for each in value]
    if isinstance(value, dict):
        clock = re.compile("runtime|per_second|^eps$")
        return {key: without_times(each) for key, each in value.items() if not clock.search(key)}
    return value


WEIGHTS = [f"{name}/adapter_model.safetensors" for name in ("sft", "reward", "ppo", "ppo/value")]
WEIGHTS += ["merged/model.safetensors", "merged/config.json", "ppo/samples.jsonl"]
FIGURES = ["sft/metrics.json", "reward/metrics.json", "reward/evaluation/evaluation.json", "ppo/metrics.json"]
FIGURES += ["report/report.json"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="which processes a run has is read from /proc")
def test_killed_at_any_moment_of_any_stage(tiny_base, kochatgpt_files, tmp_path, capsys):
    FORKS.set_forkserver_preload([*PRELOADED, __name__])
    seed = int(os.environ.get("KOCHAT_SEED", random.randrange(10**6)))
    with capsys.disabled():
        print(f"KOCHAT_SEED={seed}", flush=True)
    rng = random.Random(seed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        write_set(folder, tiny_base, kochatgpt_files)
    assert Run(whole).ended() == 0, (whole / "log.txt").read_text()
    kept, output = sorted(rng.sample(range(len(MOMENTS)), min(KILLS, len(MOMENTS)))), broken / "out"
    kills = 0
    for number, moment in enumerate(kept):
        patterns = {pattern for pattern, _ in MOMENTS[moment:]}
        before = there(output, patterns)
        run = Run(broken, forked=number % 10 != 5)
        deadline = time.monotonic() + 120
        while run.code() is None and there(output, patterns) <= before:
            assert time.monotonic() < deadline, (broken / "log.txt").read_text()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, MOMENTS[moment][1]))
        if run.code() is not None:
            assert run.code() == 0, (seed, (broken / "log.txt").read_text())
            break
        run.kill(rng)
        kills += 1
        if kills == 1:
            (output / "sft/mine.txt").write_text("mine")
    assert kills > len(kept) // 2
    assert Run(broken).ended() == 0, (seed, (broken / "log.txt").read_text())
    for name in WEIGHTS:
        assert (output / name).read_bytes() == (whole / "out" / name).read_bytes(), (seed, name)
    for name in FIGURES:
        found, expected = (json.loads((folder / "out" / name).read_text("utf-8")) for folder in (broken, whole))
        assert without_times(found) == without_times(expected), (seed, name)
    assert [path.read_text() for path in output.glob("sft*/mine.txt")] == ["mine"]
    stages = [output / stage for stage in ("sft", "reward", "ppo", "merged", "report")]
    unfinished = [path for stage in stages for path in stage.glob("*.unfinished")]
    assert not [*unfinished, *output.glob("*.unfinished"), *(s for s in stages if (s / "progress.json").exists())], seed
