"""Runs of several configs side by side: means over seeds, with Student's 95 % intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kochat_trl.data.probes import PROBES
from kochat_trl.desk.statistics import half_interval
from kochat_trl.desk.workflow.pipeline import Plan

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def figures_of(plan: Plan) -> dict[str, float]:
    """What a finished run achieved, by the name of its column; a figure that the run has not is left out."""
    report = _read(plan.outputs["report"] / "report.json")
    found: dict[str, float] = {}
    if (loss := _read(plan.outputs["sft"] / "metrics.json").get("eval_loss")) is not None:
        found["SFT loss"] = loss
    if "evaluate" in plan.outputs:
        found["RM accuracy"] = _read(plan.outputs["evaluate"] / "evaluation.json")["accuracy"]["accuracy"]
    asked = [row for row in report["answers"] if row["prompt"] not in dict(PROBES)]
    found["RM spread"] = stdev(row["sft"]["score"] for row in asked)
    (ppo,) = report["runs"]
    for name in ("sft", ppo):
        if "judge" in report["metrics"][name]:
            found[f"judge, {'SFT' if name == 'sft' else 'PPO'}"] = report["metrics"][name]["judge"]
    found["PPO wins"] = report["wins"][f"{ppo} over sft"]["share"]
    found["KL"] = report["kl"][ppo]["mean"]
    found["tokens"] = report["metrics"][ppo]["tokens"]
    return found


def compare_runs(plans: Sequence[Plan]) -> list[list[str]]:
    """A heading, and a line for each config: the mean of each figure over the seeds, ± half its interval."""
    by_config: dict[str, list[dict[str, float]]] = {}
    for plan in plans:
        by_config.setdefault(plan.name, []).append(figures_of(plan))
    columns = list(dict.fromkeys(name for runs in by_config.values() for run in runs for name in run))
    lines = [["", *columns]]
    for config, runs in by_config.items():
        cells = [[run[column] for run in runs if column in run] for column in columns]
        lines.append([config, *(_cell(values) for values in cells)])
    return lines


def _cell(values: Sequence[float]) -> str:
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
