"""An evaluation for people: tables, warnings, a plot of reliability, and the two files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kochat_trl.desk.evaluation.metrics import BINS, Figures
from kochat_trl.desk.statistics import wilson_interval
from kochat_trl.desk.writers import to_json
from kochat_trl.files import full_disk_told, new_file, refuse_existing

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

ACCURACY = ("pairs", "right", "95 % interval")


def print_evaluation(evaluation: Figures, quantized: dict[str, Figures], console: Console) -> None:
    """Print all of an evaluation, with a warning for each baseline that the model doesn't beat."""
    total, rules = evaluation["accuracy"], evaluation["baselines"]
    console.print(f"{total['pairs']:,} pairs of {evaluation['answers']:,} answers to {total['prompts']:,} prompts")
    rows: list[tuple[str, ...]]
    rows = [
        (name, *_cells(rule["accuracy"]), f"{'yes' if rule['beaten'] else 'no'}, {_p(rule['p'])}")
        for name, rule in rules.items()
    ]
    _print(console, ("all pairs", *ACCURACY, "beaten"), [("the model", *_cells(total), ""), *rows])
    for heading, key in (("pairs by rank", "by_kind"), ("better answer, in tokens", "by_length_gap")):
        _print(console, (heading, *ACCURACY), [(name, *_cells(part)) for name, part in evaluation[key].items()])
    numbers = ("mean", "std", "min", "max")
    rows = [
        (f"{rank}{', the best' if rank == 0 else ''}", f"{s['answers']:,}", *(f"{s[name]:.3f}" for name in numbers))
        for rank, s in evaluation["scores_by_rank"].items()
    ]
    _print(console, ("scores by rank", "answers", *numbers), rows)
    if quantized:
        rows = [
            (name, f"{a['same_order']:.1%}", f"{a['mean_difference']:.4f}", f"{a['max_difference']:.4f}")
            for name, a in quantized.items()
        ]
        _print(console, ("against float32", "same order", "mean |Δscore|", "max |Δscore|"), rows)
    console.print(f"\nexpected calibration error    {evaluation['calibration']['error']:.3f}\n")
    for name, rule in rules.items():
        if not rule["beaten"]:
            told = f"better on {rule['ahead']:,} of {total['prompts']:,} prompts, worse on {rule['behind']:,}"
            console.print(Text(f"WARNING: not shown to beat '{name}': {told}, {_p(rule['p'])}.", "bold yellow"))


def _cells(accuracy: Figures) -> tuple[str, str, str]:
    low, high = accuracy["interval"]
    return f"{accuracy['pairs']:,}", f"{accuracy['accuracy']:.1%}", f"{low:.1%} – {high:.1%}"


def _print(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(headings[0], min_width=26)  # so that the tables stand in line
    for name in headings[1:]:
        table.add_column(name, justify="right", no_wrap=True, min_width=15 if "interval" in name else 7)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def output_files(folder: str | Path) -> tuple[Path, Path]:
    """The two files of an evaluation in `folder`. Raises `UserError` if one is there already."""
    paths = Path(folder) / "evaluation.json", Path(folder) / "reliability.png"
    for path in paths:
        refuse_existing(path)
    return paths


def write_evaluation(
    folder: str | Path, evaluation: Figures, quantized: dict[str, Figures], facts: dict[str, Any]
) -> None:
    """Write `evaluation.json`, which begins with `facts`, and `reliability.png` as new files."""
    json_file, png_file = output_files(folder)
    image = io.BytesIO()
    plot_reliability(evaluation["calibration"]).savefig(image, format="png", dpi=150)
    png_file.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_told(png_file.parent), png_file.open("xb") as file:
        file.write(image.getvalue())
    with new_file(json_file) as stream:  # last: it says that the evaluation is finished
        stream.write(to_json(facts | evaluation | {"against_float32": quantized}, indent=2) + "\n")


def plot_reliability(calibration: Figures) -> Any:
    """A figure of accuracy against confidence, with the number of pairs of each bin below it.

    Points on the diagonal are calibrated; below it the model is too sure. Bars are Wilson's intervals of each bin, its
    pairs taken for independent.
    """
    from matplotlib.figure import Figure  # without pyplot: it needs no display and leaves nothing open

    bins = calibration["bins"]
    confidences, rights = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    intervals = [wilson_interval(b["accuracy"] * b["pairs"], b["pairs"]) for b in bins]
    errors = np.abs(np.transpose(intervals) - rights)  # (2, bins): below, above
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot((0.5, 1), (0.5, 1), color="0.6", linestyle="--", label="calibrated")
    upper.errorbar(confidences, rights, errors, fmt="o-", capsize=3, label="the model, 95 % intervals")
    upper.set(ylim=(-0.03, 1.03), ylabel="share of pairs put right")
    upper.set_title(f"expected calibration error {calibration['error']:.3f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    upper.grid(alpha=0.3)
    lower.bar([b["low"] for b in bins], [b["pairs"] for b in bins], 0.5 / BINS, align="edge", edgecolor="white")
    lower.set(xlim=(0.5, 1), xlabel="confidence σ(|r₁ − r₂|)", ylabel="pairs")
    return figure
