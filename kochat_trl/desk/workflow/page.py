"""A report as a page that needs nothing else: its template filled in, its plots drawn as SVG."""

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from kochat_trl.data.probes import PROBES
from kochat_trl.data.text import all_visible
from kochat_trl.files import new_file, set_aside

from jinja2 import Template

# Stages, and a key that only the settings of each have.
MADE_BY = {"sft": "packing", "reward": "center_rewards_coefficient", "ppo": "reward_model_path", "dpo": "ld_alpha"}
MADE_BY |= {"kto": "desirable_weight"}
CURVES = {
    "sft": {"loss": "SFT loss", "eval_loss": "SFT held-out loss"},
    "reward": {"loss": "reward model loss", "eval_accuracy": "reward model held-out pair accuracy"},
    "ppo": {
        "objective/scores": "PPO score",
        "eval_score": "PPO held-out score, greedy",
        "objective/kl": "PPO KL from SFT, nats a response",
        "objective/response_tokens": "PPO response tokens",
        "policy/entropy_avg": "PPO entropy, nats a token",
    },
    "dpo": {"loss": "DPO loss", "rewards/margins": "DPO margin, β · log-ratio", "eval_loss": "DPO held-out loss"},
    "kto": {"loss": "KTO loss", "kl": "KTO estimate of KL, nats", "eval_loss": "KTO held-out loss"},
}
REWARDS = ("rewards/", "eval_rewards/")  # what the keys of functions that reward begin with
COLORS = ["#4a90d9", "#e0802b", "#3c9d57", "#c8508a", "#8a8f30"]


def write_report(report: dict[str, Any], folder: str | Path) -> Path:
    """Write report.json and report.html, which needs nothing else, into `folder`; an older report is renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.html"):
        set_aside(folder / name)
    page = folder / "report.html"
    texts = {"report.json": json.dumps(report, ensure_ascii=False, indent=2) + "\n", page.name: render_page(report)}
    for name, text in texts.items():  # the page last: it says that the report is finished
        with new_file(folder / name) as stream:
            stream.write(text)
    return page


def render_page(report: dict[str, Any]) -> str:
    """The page as one HTML text, with its plots in it; what can't be seen in a text stands there as its escape."""
    report = all_visible(report)
    template = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    runs, histories = list(report["runs"]), report["curves"]
    plots, numbers = [], []
    for stage in CURVES:
        drawn = [name for name, method in report["methods"].items() if method == stage] or [stage]
        its = {name: histories[name] for name in drawn if name in histories}
        for key, title in titles_of(stage, its.values()).items():
            lines = {name: points_of(history, key) for name, history in its.items()}
            if any(len(x) > 1 for x, _ in lines.values()):
                plots.append((title, line_plot(lines)))
            numbers += [(title, y[0]) for _, y in lines.values() if len(y) == 1]
    models = list(report["metrics"])
    counted = [row for row in report["answers"] if row["prompt"] not in dict(PROBES)]
    probes = [row for row in report["answers"] if row["prompt"] in dict(PROBES)]
    scores = {name: [row[name]["score"] for row in counted] for name in models}
    spread = _svg(lambda axes: _histogram(axes, scores))
    by_reward = {name: histories[name] for name in runs if report["methods"][name] == "ppo"}
    by_kl = _svg(lambda axes: _against(axes, by_reward)) if by_reward else None
    reliability = Path(report["reward"]) / "evaluation" / "reliability.png"
    image = base64.b64encode(reliability.read_bytes()).decode() if reliability.is_file() else None
    filled = {"plots": plots, "numbers": numbers, "spread": spread, "by_kl": by_kl, "reliability": image}
    shown = {"report": report, "models": models, "counted": counted, "probes": probes}
    return Template(template, autoescape=True).render(shown | filled)


def titles_of(stage: str, histories: Iterable[Sequence[dict[str, Any]]]) -> dict[str, str]:
    """The curves of a stage: keys of its history, and titles. PPO has one more for each function that rewards."""
    if stage != "ppo":
        return CURVES[stage]
    own = {key for history in histories for entry in history for key in entry if key.startswith(REWARDS)}
    return CURVES["ppo"] | {key: f"PPO {key.removesuffix('/mean')}" for key in sorted(own)}


def points_of(history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps of a curve, and its values."""
    points = [(entry.get("step", i), entry[key]) for i, entry in enumerate(history) if key in entry]
    return [x for x, _ in points], [y for _, y in points]


def line_plot(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Curves in one plot, as SVG; their names are in it where they are several."""

    def draw(axes: Any) -> None:
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=name)

    return _svg(draw)


def _histogram(axes: Any, scores: dict[str, list[float]]) -> None:
    axes.set_prop_cycle(color=["0.6", "#8a63d2", *COLORS])  # base, SFT, runs
    axes.hist(list(scores.values()), bins=24, histtype="step", linewidth=1.6, label=list(scores))
    axes.set(xlabel="score", ylabel="answers")


def _against(axes: Any, histories: dict[str, Sequence[dict[str, Any]]]) -> None:
    for name, history in histories.items():
        kl, score = (points_of(history, f"objective/{key}")[1] for key in ("kl", "scores"))
        axes.plot(kl, score, "o-", markersize=3, label=name)
    axes.set(xlabel="KL from SFT, nats a response", ylabel="score")


def _svg(draw: Any) -> str:
    """A plot as SVG that is legible on light and dark: no background, grey ink, text as text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: it needs no display

    grey = "#888"
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kochat", "font.size": 9, "text.color": grey}
    style |= {f"{name}.color": grey for name in ("xtick", "ytick")}
    style |= {"axes.edgecolor": grey, "axes.labelcolor": grey, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(4.4, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLORS)
        draw(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, labelcolor=grey)
        axes.grid(alpha=0.25)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = "<svg" + buffer.getvalue().partition("<svg")[2]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)  # as wide as its place
