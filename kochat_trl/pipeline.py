"""SFT → reward model → PPO → merge → report as one command, which goes on where it stopped.

Every stage is the command that a person would type, in a process of its own.
"""

import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arguments import read_config
from .errors import UserError

ROOT = Path(__file__).parents[1]
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "reward": (),
    "ppo": ("sft", "reward"),
    "merge": ("ppo",),
    "report": ("sft", "reward", "ppo"),
}
RECIPES = ("sft", "reward", "ppo")
# A file that a finished stage has, and a stage that broke off has not.
FINISHED = dict.fromkeys(RECIPES, "metrics.json") | {"merge": "config.json", "report": "report.html"}


@dataclass(frozen=True)
class Step:
    """What is to be done for a stage: `command`, or None where it is done. `why` says it in words."""

    stage: str
    output: Path
    command: list[str] | None
    why: str


def make_plan(
    folder: str | Path, first: str | None = None, seed: int | None = None, launcher: str | None = None
) -> list[Step]:
    """The steps of the stages that `folder` has a config of (sft.yaml, reward.yaml, ppo.yaml), merge and report.

    A finished stage is kept, one that broke off goes on from its last checkpoint or, without one, starts anew; what
    depends on a stage that runs runs again. With `first`, that stage and all after it run again. What was there is
    renamed, never overwritten. `launcher` is a config file of accelerate.

    A stage that finished before one that it reads from is not done. Raises `UserError` if a config can't be read, if
    PPO reads from elsewhere than SFT and reward model write to, if a finished stage was run with other settings than
    the config has now, or if a stage before `first` isn't finished.
    """
    configs = {stage: Path(folder) / f"{stage}.yaml" for stage in RECIPES}
    if missing := [str(path) for path in configs.values() if not path.is_file()]:
        raise UserError(f"{folder}: a set of configs is a folder with sft.yaml, reward.yaml, ppo.yaml; no {missing[0]}")
    values = {stage: {key: value for key, (value, _) in read_config(path).items()} for stage, path in configs.items()}
    for stage, found in values.items():
        if "output_dir" not in found:
            raise UserError(f"{configs[stage]}: 'output_dir' is not set")
    outputs = {stage: Path(found["output_dir"]) for stage, found in values.items()}
    for stage in NEEDS["ppo"]:
        if (reads := values["ppo"].get(f"{stage}_model_path")) != str(outputs[stage]):
            raise UserError(
                f"{configs['ppo']}: {stage}_model_path is {reads}, and {configs[stage]} writes {outputs[stage]}"
            )
    ppo = outputs["ppo"]
    beside = "" if ppo.name == "ppo" else f"{ppo.name}-"
    if values["ppo"].get("use_peft"):
        outputs["merge"] = ppo.with_name(f"{beside}merged")
    outputs["report"] = ppo.with_name(f"{beside}report")
    order = list(outputs)
    if first is not None and first not in order:
        raise UserError(f"--from: found '{first}', expected {', '.join(order)}")

    steps: list[Step] = []
    for stage, output in outputs.items():
        done = (output / FINISHED[stage]).is_file()
        again = first is not None and order.index(stage) >= order.index(first)
        again = again or any(step.command and step.stage in NEEDS[stage] for step in steps)
        again = again or (done and any(_finished(outputs[n], n) > _finished(output, stage) for n in NEEDS[stage]))
        if first is not None and order.index(stage) < order.index(first) and not done:
            raise UserError(f"--from {first}: {stage} isn't finished: no {FINISHED[stage]} in {output}")
        if done and not again:
            if stage in values:
                _check_settings(stage, output, values[stage] | ({} if seed is None else {"seed": seed}))
            steps.append(Step(stage, output, None, "done"))
            continue
        why, options = "new", list[str]()
        if output.is_dir() and any(output.iterdir()):
            checkpoint = None if done or again else _last_checkpoint(output)
            why = f"goes on from {checkpoint.name}" if checkpoint else "again; what is there is renamed"
            options = (
                ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else ["--overwrite_output_dir", "true"]
            )
        if stage == "merge":
            command = [sys.executable, _of_project("scripts/merge_lora.py")]
            command += ["--adapter", str(ppo), "--output", str(output)]
        elif stage == "report":
            command = [sys.executable, "-m", "kochat_trl.cli", "report", str(ppo), "--output", str(output)]
            command += [] if seed is None else ["--seed", str(seed)]
        else:
            command = [*_launch(launcher), _of_project(f"recipes/{stage}.py"), "--config", str(configs[stage])]
            command += options if seed is None else [*options, "--seed", str(seed)]
        steps.append(Step(stage, output, command, why))
    return steps


def _finished(output: Path, stage: str) -> float:
    """When a stage finished; never, of one that hasn't."""
    file = output / FINISHED[stage]
    return file.stat().st_mtime if file.is_file() else -math.inf


def _launch(launcher: str | None) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    if launcher is not None:
        return [*command, launcher]
    command.append(_of_project(f"configs/accelerate/{'one_gpu' if torch.cuda.is_available() else 'cpu'}.yaml"))
    if "OMP_NUM_THREADS" not in os.environ:  # accelerate would take one
        command += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    return command


def _of_project(path: str) -> str:
    return os.path.relpath(ROOT / path)


def _last_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint: the trainers write the file of their state last."""
    whole = [path.parent for path in output.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def _check_settings(stage: str, output: Path, values: dict[str, Any]) -> None:
    """Raise `UserError` if the finished stage in `output` was run with other settings than `values`."""
    then = yaml.safe_load((output / "resolved.yaml").read_text(encoding="utf-8"))
    for key, now in values.items():
        if isinstance(then.get(key), float) and isinstance(now, str):
            with suppress(ValueError):
                now = float(now)  # YAML reads 1e-5 as a string
        if key in then and then[key] != now:
            raise UserError(
                f"{output}: {stage} was run with {key}: {then[key]}, and its config says {now}. Run it again with "
                f"--from {stage}, or give it another output_dir"
            )


def print_plan(steps: list[Step], console: Console) -> None:
    """A line for each stage, and the commands."""
    table = Table("stage", "", "output", box=None)
    for step in steps:
        table.add_row(step.stage, step.why, Text(str(step.output)))
    console.print(table)
    for step in steps:
        if step.command:
            console.print(Text(f"$ {' '.join(_shown(word) for word in step.command)}"), soft_wrap=True)


def _shown(word: str) -> str:
    return "python" if word == sys.executable else word


def run_plan(steps: list[Step], console: Console) -> dict[str, float]:
    """Run the steps in turn; returns the seconds of those that ran. Raises `UserError` at the first that fails."""
    seconds = {}
    for number, step in enumerate(steps, start=1):
        console.rule(f"[bold]{number}/{len(steps)} {step.stage}[/]: {step.why}")
        if step.command is None:
            continue
        if step.stage == "merge" and step.output.exists():
            from .outputs import set_aside

            set_aside(step.output)
        started = time.perf_counter()
        try:
            done = subprocess.run(step.command)
        except KeyboardInterrupt:
            raise UserError(
                f"{step.stage} was stopped. PPO finishes its update and saves first, if its config saves checkpoints; "
                "then the same command, without --from, goes on"
            ) from None
        if done.returncode:
            raise UserError(
                f"{step.stage} failed; its message is above. Once mended, the same command, without --from, goes on"
            )
        seconds[step.stage] = round(time.perf_counter() - started, 1)
    return seconds
