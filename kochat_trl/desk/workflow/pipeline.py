"""SFT → reward model → PPO or another → merge → report in one command, which goes on where it stopped; runs compared.

Every stage is the command that a person would type, in a process of its own. A config is a folder with a file for each
stage, or an experiment: a file that extends such a folder, and says what differs.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kochat_trl.checkpoints import last_checkpoint
from kochat_trl.data.probes import PROBES
from kochat_trl.desk.statistics import half_interval
from kochat_trl.errors import UserError
from kochat_trl.files import is_unused, set_aside
from kochat_trl.settings.parse import changed_setting, folder_of, read_config, resolve_arguments

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parents[3]
# What trains the policy, and the stages that it reads from.
METHODS: dict[str, tuple[str, ...]] = {"ppo": ("sft", "reward"), "dpo": ("sft",), "kto": ("sft",)}
# A file that a finished stage has, and a stage that broke off has not.
FINISHED = dict.fromkeys(("sft", "reward", *METHODS), "metrics.json")
FINISHED |= {"evaluate": "evaluation.json", "merge": "config.json", "report": "report.html"}


@dataclass(frozen=True)
class Step:
    """What is to be done for a stage: `command`, or None where it is done. `why` says it in words."""

    stage: str
    output: Path
    command: list[str] | None
    why: str


@dataclass(frozen=True)
class Plan:
    """The steps of one run of a config. `outputs` has the folder of each stage, also of those that were done before."""

    name: str
    seed: int | None
    method: str
    outputs: dict[str, Path]
    steps: list[Step]


def make_plan(
    config: str | Path,
    first: str | None = None,
    seed: int | None = None,
    launcher: str | None = None,
    among: bool = False,
    method: str = "ppo",
) -> Plan:
    """The steps of SFT, reward model, its evaluation if it has `eval_files`, the method, merge and report.

    A finished stage is kept, one that broke off goes on from its last checkpoint or, without one, starts anew; what
    depends on a stage that runs runs again. With `first`, that stage and all after it run again. What was there is
    renamed, never overwritten. `launcher` is a config file of accelerate.

    A stage of an experiment that computes what the same stage of its folder does is that one; the others write to a
    folder with the experiment's name. A run `among` others has a folder for its seed too, and is not merged.

    A stage that finished before one that it reads from is not done. Raises `UserError` if a config can't be read, if
    the method reads from elsewhere than SFT and reward model write to, if a finished stage was run with other settings
    than the config has now, or if a stage before `first` isn't finished.
    """
    config = Path(config)
    folder = folder_of(config)
    recipes: tuple[Any, ...] = ("sft", "reward", method)
    stages = {"sft": (), "reward": (), "evaluate": ("reward",), method: METHODS[method], "merge": (method,)}
    stages["report"] = ("sft", "reward", "evaluate", method)  # stages in order, and what each reads from
    values = {stage: _values(config, stage) for stage in recipes}
    of_folder = {stage: _values(folder, stage) for stage in recipes}
    for stage in stages[method]:
        reads, writes = of_folder[method].get(f"{stage}_model_path"), of_folder[stage]["output_dir"]
        if reads != writes:
            raise UserError(f"{folder}/{method}.yaml: {stage}_model_path is {reads}, and {stage}.yaml writes {writes}")

    outputs: dict[str, Path] = {}
    commands: dict[str, list[str]] = {}
    resolved: dict[str, dict[str, Any]] = {}
    differs: list[str] = []
    own_seed = {} if seed is None else {"seed": seed}
    of_seed = [f"seed{seed}"] if among and seed is not None else []

    def place(beside: Path, is_own: bool, name: str) -> Path:
        return beside.parent.joinpath(*[config.stem] * is_own, *of_seed, name)

    for stage in recipes:
        own, shared = values[stage], of_folder[stage]
        output = Path(shared["output_dir"])
        for key in ("output_dir", "sft_model_path", "reward_model_path"):
            if own.get(key) != shared.get(key):
                raise UserError(f"{config}: leave {key} out: each stage gets a folder '{config.stem}' beside {output}")
        if own != shared or any(need in differs for need in stages[stage]):
            differs.append(stage)
        outputs[stage] = place(output, stage in differs, output.name)
        inputs = {f"{need}_model_path": str(outputs[need]) for need in stages[stage]}
        in_force = own | inputs | {"output_dir": str(outputs[stage])} | own_seed
        flags = _flags({key: value for key, value in in_force.items() if value != own.get(key)})
        # A mistake in the last config is told before SFT runs.
        resolved[stage] = resolve_arguments(stage, str(config), flags)
        file = config / f"{stage}.yaml" if config.is_dir() else config
        recipe = _of_project(f"recipes/{stage}.py")
        commands[stage] = [*_launch(launcher), recipe, "--config", str(file), *flags]
    trust = ["--trust-remote-code"] if any(values[stage].get("trust_remote_code") for stage in recipes) else []
    reward, policy = outputs["reward"], outputs[method]
    beside = "" if policy.name == "ppo" else f"{policy.name}-"
    judged = of_folder["reward"]  # what all experiments are measured by
    if judged.get("eval_files"):
        outputs["evaluate"] = reward / "evaluation"
        asked = {key.replace("_", "-"): judged.get(key, default) for key, default in EVALUATED.items()}
        commands["evaluate"] = [*_KOCHAT, "reward", "eval", str(reward), *judged["eval_files"], *_flags(asked), *trust]
    if values[method].get("use_peft") and not among:
        outputs["merge"] = policy.with_name(f"{beside}merged")
        written = _flags({"adapter": policy, "output": outputs["merge"]})
        commands["merge"] = [sys.executable, _of_project("scripts/merge_lora.py"), *written, *trust]
    own_report = not {"reward", method}.isdisjoint(differs)
    outputs["report"] = place(Path(of_folder[method]["output_dir"]), own_report, f"{beside}report")
    asked = {"output": outputs["report"]} | own_seed
    if "reward" not in stages[method]:  # asked as PPO's would be, so that the two can be compared
        ppo = read_config(config, "ppo") if (folder / "ppo.yaml").is_file() else {}
        asked |= {"reward-model": reward, "max-new-tokens": ppo.get("response_length", (None, ""))[0]}
    commands["report"] = [*_KOCHAT, "report", str(policy), *_flags(asked), *trust]
    order = [stage for stage in stages if stage in outputs]
    if first is not None and first not in order:
        raise UserError(f"--from: found '{first}', expected {', '.join(order)}")
    owner = "reward" if first == "evaluate" else first
    if owner in recipes and config != folder and owner not in differs:
        raise UserError(f"--from {first}: that stage is not {config}'s own; run it again with {folder}")

    steps: list[Step] = []
    start = len(order) if first is None else order.index(first)
    for number, stage in enumerate(order):
        output, needs = outputs[stage], [need for need in stages[stage] if need in outputs]
        done = (output / FINISHED[stage]).is_file()
        if done and stage == "evaluate":
            done = _is_of(output / FINISHED[stage], judged)
        if first is not None and number < start and not done:
            raise UserError(f"--from {first}: {stage} isn't finished: no {FINISHED[stage]} in {output}")
        again = number >= start or any(step.command and step.stage in needs for step in steps)
        again = again or (done and any(_finished(outputs[n], n) > _finished(output, stage) for n in needs))
        if done and not again:
            if stage in recipes:
                _check_settings(stage, output, resolved[stage], set(values[stage]))
            steps.append(Step(stage, output, None, "done"))
            continue
        why, options = "new", list[str]()
        if not is_unused(output):
            why, options = "again; what is there is renamed", ["--overwrite_output_dir", "true"]
            checkpoint, faults = (None, []) if done or again else last_checkpoint(output)
            if checkpoint:
                why, options = f"goes on from {checkpoint.name}", ["--resume_from_checkpoint", str(checkpoint)]
            why = "; ".join([why, *faults])
        steps.append(Step(stage, output, commands[stage] + (options if stage in recipes else []), why))
    name = config.stem if method == "ppo" else f"{config.stem}, {method}"
    return Plan(name, seed, method, outputs, steps)


def make_plans(
    configs: Sequence[str], seeds: Sequence[int], launcher: str | None = None, methods: Sequence[str] = ("ppo",)
) -> list[Plan]:
    """A plan for each seed of each config with each method; a step that several share is in the first of them alone."""
    plans: list[Plan] = []
    named: dict[str, list[Any]] = {
        "config": [Path(config).stem for config in configs],
        "seed": [*seeds],
        "method": [*methods],
    }
    for what, given in named.items():
        if len(set(given)) < len(given):
            raise UserError(f"a {what} is named twice, or two have the same name: {', '.join(map(str, given))}")
    for config, method, seed in product(configs, methods, seeds or (None,)):
        plan = make_plan(config, None, seed, launcher, True, method)
        before = {step.output for earlier in plans for step in earlier.steps}
        plans.append(replace(plan, steps=[step for step in plan.steps if step.output not in before]))
    return plans


_KOCHAT = [sys.executable, "-m", "kochat_trl.cli.main"]
# What the evaluation of a reward model takes from its config, and the defaults.
EVALUATED = {"ranking_order": "best_first", "invalid_records": "error", "overlong": "error", "max_length": None}


def _flags(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


def _values(config: Path, stage: Any) -> dict[str, Any]:
    values = {key: value for key, (value, _) in read_config(config, stage).items()}
    if "output_dir" not in values:
        raise UserError(f"{config}: 'output_dir' is not set for {stage}")
    return values


def _is_of(evaluation: Path, reward: dict[str, Any]) -> bool:
    """Whether an evaluation was made on the rankings, and in the reading, that a reward model's config names."""
    facts = _read(evaluation)
    keys = {"ranking_order", "overlong"} | ({"max_length"} if reward.get("overlong", "error") != "error" else set())
    same = all(facts.get(key, EVALUATED[key]) == reward.get(key, EVALUATED[key]) for key in keys)
    return same and facts.get("files") == reward["eval_files"]


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


def _check_settings(stage: str, output: Path, now: dict[str, Any], given: set[str]) -> None:
    """Raise `UserError` if the finished stage in `output` was run with other values than those in force `now`."""
    then = yaml.safe_load((output / "resolved.yaml").read_text(encoding="utf-8"))
    if key := changed_setting(then, now, given):
        raise UserError(
            f"{output}: {stage} was run with {key}: {then[key]}, and its config says {now[key]}. To run it again, "
            f"rename that folder; for a single run --from {stage} does it"
        )


def print_plan(steps: Sequence[Step], console: Console) -> None:
    """A line for each stage, and the commands."""
    table = Table("stage", "", "output", box=None)
    for step in steps:
        table.add_row(step.stage, step.why, Text(str(step.output)))
    console.print(table)
    for step in steps:
        if step.command:
            shown = ["python" if word == sys.executable else word for word in step.command]
            console.print(Text(f"$ {' '.join(shown)}"), soft_wrap=True)


def run_plan(steps: Sequence[Step], console: Console) -> dict[str, float]:
    """Run the steps in turn; returns the seconds of those that ran. Raises `UserError` at the first that fails."""
    seconds = {}
    for number, step in enumerate(steps, start=1):
        console.rule(f"[bold]{number}/{len(steps)} {step.stage}[/]: {step.why}")
        if step.command is None:
            continue
        if step.stage in ("merge", "evaluate") and step.output.exists():
            set_aside(step.output)
        started = time.perf_counter()
        code, stopped = _run(step.command, console)
        if stopped:
            raise UserError(
                f"{step.stage} was stopped. PPO finishes its update and saves first, if its config saves checkpoints; "
                "then the same command, without --from, goes on"
            )
        if code:
            raise UserError(
                f"{step.stage} failed; its message is above. Once mended, the same command, without --from, goes on"
            )
        seconds[step.stage] = round(time.perf_counter() - started, 1)
    return seconds


def _run(command: list[str], console: Console) -> tuple[int, bool]:
    """The exit code of a command that ran in a process group of its own, and whether a signal stopped it.

    accelerate's launcher ends at Ctrl-C and leaves the recipe, which is still saving, to itself: a quick rerun would
    race it. So the first signal goes to the whole group, once, and all of the group is waited for; a second kills it.
    """
    signals: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int | None = None, frame: Any = None) -> None:
        if number is not None:
            signals.append(number)
            if len(signals) == 1:
                console.print("Waiting for it to end: PPO finishes its update and saves. Ctrl-C again kills it.")
        if process is not None and signals:
            with suppress(ProcessLookupError, PermissionError):  # all have ended
                _to_all(process.pid, signals[0] if len(signals) == 1 else getattr(signal, "SIGKILL", signal.SIGTERM))

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    caught = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        pass_on()  # what came before there was a process
        code = process.wait()
        while signals and hasattr(os, "killpg") and _is_running(process.pid):
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, bool(signals)


_to_all = getattr(os, "killpg", os.kill)  # Windows has no process groups of this kind


def _is_running(group: int) -> bool:
    """Whether a process of the group runs. One that has ended and that nobody asked after, a zombie, doesn't."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # the second is what macOS says of zombies
        return False
    if not Path("/proc/self/stat").exists():
        return True
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, of, *_ = file.read_text().rpartition(")")[2].split()
            found += [state] if int(of) == group else []
    return any(state not in "ZX" for state in found)


# --- Runs side by side ----------------------------------------------------------------------------


def figures_of(plan: Plan) -> dict[str, float]:
    """What a finished run achieved, by the name of its column; a figure that the run has not is left out."""
    report = _read(plan.outputs["report"] / "report.json")
    (run,), metrics, name = report["runs"], report["metrics"], plan.method.upper()
    asked = [row for row in report["answers"] if row["prompt"] not in dict(PROBES)]
    evaluation = _read(plan.outputs["evaluate"] / "evaluation.json") if "evaluate" in plan.outputs else None
    found = {
        "SFT loss": _read(plan.outputs["sft"] / "metrics.json").get("eval_loss"),
        "RM accuracy": evaluation and evaluation["accuracy"]["accuracy"],
        "RM spread": stdev(row["sft"]["score"] for row in asked),
        "right, SFT": metrics["sft"].get("right"),
        f"right, {name}": metrics[run].get("right"),
        f"{name} wins": report["wins"][f"{run} over sft"]["share"],
        "KL": report["kl"][run]["mean"],
        "tokens": metrics[run]["tokens"],
    }
    return {name: value for name, value in found.items() if value is not None}


def compare_runs(plans: Sequence[Plan]) -> list[list[str]]:
    """A heading, and a line for each config: the mean of each figure over the seeds, ± half Student's 95 % interval."""
    by_config: dict[str, list[dict[str, float]]] = {}
    for plan in plans:
        by_config.setdefault(plan.name, []).append(figures_of(plan))
    columns = list(dict.fromkeys(name for runs in by_config.values() for run in runs for name in run))
    lines = [["", *columns]]
    for config, runs in by_config.items():
        cells = [[run[column] for run in runs if column in run] for column in columns]
        lines.append([config, *(cell(values) for values in cells)])
    return lines


def cell(values: Sequence[float]) -> str:
    """The mean, ± half Student's 95 % interval where there are several."""
    if not values:
        return "–"
    digits = 1 if fmean(values) > 10 else 3 if fmean(values) < 1 else 2
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {half_interval(values):.{digits}f}"


def print_runs(lines: Sequence[Sequence[str]], console: Console) -> None:
    """The lines as a table of the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=True)
    table.add_column(overflow="fold")
    for heading in lines[0][1:]:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*(Text(cell.replace(" ±", "\n±")) for cell in line))
    console.print(table)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """The lines as a table of Markdown."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]])


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
