"""What a PPO run changed: base, SFT and PPO side by side, as a page and as JSON."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Template
from tqdm.auto import tqdm

from .arguments import ModelArguments
from .data.convert import encode_prompts
from .data.readers import read_records
from .data.records import RecordError, parse
from .data.sample import mean_interval
from .errors import UserError
from .evaluate import accuracy_of, load_scorer, score_ids
from .generate import Answer, decoding, generate_answers, mean_logprob
from .merge import PROBES
from .models import load_config, load_policy
from .outputs import set_aside
from .text_metrics import bleu, chrf, distinct, hangul_share, rouge_l
from .tokenizer import load_tokenizer

LIMIT = 200  # prompts; chrF and the intervals hardly change beyond
MODELS = ("base", "sft", "ppo")


@dataclass(frozen=True)
class Run:
    """The folders of a PPO run's stages, as their `resolved.yaml` name them; `settings` are PPO's."""

    base: str
    revision: str
    sft: Path
    reward: Path
    ppo: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, ppo: str | Path) -> "Run":
        """The run whose PPO output is the folder `ppo`. Raises `UserError` if that isn't one, or a stage is gone."""
        settings = _resolved(Path(ppo))
        if "sft_model_path" not in settings:
            raise UserError(f"{ppo}: not the output of recipes/ppo.py; give that folder, such as outputs/kogpt2/ppo")
        sft, reward = Path(settings["sft_model_path"]), Path(settings["reward_model_path"])
        _resolved(reward)
        started = _resolved(sft)
        return cls(
            started["model_name_or_path"], started.get("model_revision", "main"), sft, reward, Path(ppo), settings
        )


def _resolved(folder: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no resolved.yaml there, so it is no stage's output") from None


def read_questions(run: Run, file: str | None, limit: int = LIMIT) -> tuple[list[str], dict[str, str], bool]:
    """The prompts to ask, after the course's four; references to those that have one; whether they are held out.

    They come from `file`, any data file that has prompts, or from SFT's or PPO's `eval_files`, or else from the prompts
    that PPO trained on. Records that can't be read are left out.
    """
    sft = _resolved(run.sft)
    sources = [file] if file else sft["eval_files"] or run.settings["eval_files"] or run.settings["train_files"]
    trained = {str(Path(path).resolve()) for path in [*sft.get("train_files", []), *run.settings["train_files"]]}
    held_out = not any(str(Path(source).resolve()) in trained for source in sources)
    prompts: list[str] = [prompt for prompt, _ in PROBES]
    references: dict[str, str] = {}
    for source in sources:
        for raw in read_records(source):
            if len(prompts) >= limit + len(PROBES):
                break
            try:
                prompt = parse(raw, "prompt").prompt  # type: ignore[union-attr]
            except RecordError:
                continue
            if prompt in prompts:
                continue
            prompts.append(prompt)
            try:
                messages = parse(raw, "sft").messages  # type: ignore[union-attr]
            except RecordError:
                continue
            if len(messages) == 2:
                references[prompt] = messages[1]["content"]
    return prompts, references, held_out


def build_report(ppo: str | Path, file: str | None = None, limit: int = LIMIT, seed: int = 0) -> dict[str, Any]:
    """All that the page shows, as JSON: `answers`, `metrics`, `wins`, `kl`, `curves`, `worries`, and the `run`.

    Each model answers every prompt by sampling as PPO does (the whole distribution, PPO's temperature and length). The
    course's four questions are shown, and count in no figure; prompts that leave no room for an answer are left out.
    Raises `UserError` if the folder isn't PPO's output, or if there are not two prompts to ask.
    """
    run = Run.of(ppo)
    prompts, references, held_out = read_questions(run, file, limit)
    tokenizer = load_tokenizer(str(run.ppo))
    positions = getattr(load_config(run.base, run.revision), "max_position_embeddings", math.inf)
    fits = [len(ids) + run.settings["response_length"] <= positions for ids in encode_prompts(tokenizer, prompts)]
    prompts = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    prompt_ids = encode_prompts(tokenizer, prompts)
    settings = decoding("sample") | {
        "max_new_tokens": run.settings["response_length"],
        "temperature": run.settings["temperature"],
    }
    asked = [i for i, prompt in enumerate(prompts) if prompt not in dict(PROBES)]
    if len(asked) < 2:
        raise UserError(f"{len(asked)} prompts to ask; give a file of more with --prompts")
    paths = {"base": run.base, "sft": str(run.sft), "ppo": str(run.ppo)}
    answers: dict[str, list[Answer]] = {}
    logprobs: dict[str, list[float]] = {}  # of PPO's answers
    for name in ("ppo", "sft", "base"):
        model = load_policy(paths[name], ModelArguments(dtype="float32", model_revision=run.revision), tokenizer)
        answers[name] = generate_answers(model, tokenizer, prompts, settings, seed=seed)
        if name != "base":
            pairs = list(zip(prompt_ids, answers["ppo"], strict=True))
            logprobs[name] = [
                len(answer.ids) * mean_logprob(model, ids, answer) for ids, answer in tqdm(pairs, delay=2, leave=False)
            ]
        del model
    scorer = load_scorer(str(run.reward), "float32", tokenizer)
    scores = {
        name: score_ids(scorer, tokenizer, [[*ids, *a.ids] for ids, a in zip(prompt_ids, answers[name], strict=True)])
        for name in MODELS
    }
    rows = [
        {"prompt": prompt, "reference": references.get(prompt)}
        | {name: _shown(answers[name][i], scores[name][i]) for name in MODELS}
        for i, prompt in enumerate(prompts)
    ]
    counted = [rows[i] for i in asked]
    kl = [logprobs["ppo"][i] - logprobs["sft"][i] for i in asked]
    report: dict[str, Any] = {
        "run": {"folder": str(run.ppo), "base": run.base, "reward": str(run.reward), "seed": seed}
        | {"held_out": held_out, "prompts": len(asked)},
        "metrics": {name: _metrics(counted, name, [answers[name][i].ids for i in asked]) for name in MODELS},
        "wins": {f"{one} over {other}": _wins(counted, one, other) for one, other in (("sft", "base"), ("ppo", "sft"))},
        "kl": dict(zip(("mean", "low", "high"), mean_interval(kl), strict=True)),
        "answers": rows,
        "curves": {
            name: _history(folder) for name, folder in (("sft", run.sft), ("reward", run.reward), ("ppo", run.ppo))
        },
    }
    report["worries"] = worries(report, run.settings)
    return report


def _shown(answer: Answer, score: float) -> dict[str, Any]:
    return {"text": answer.text, "ended": answer.ended, "tokens": len(answer.ids), "score": score}


def _metrics(rows: Sequence[dict[str, Any]], name: str, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Means over all answers of one model; the likeness to references over those that have one."""
    answers = [row[name] for row in rows]
    score, low, high = mean_interval([answer["score"] for answer in answers])
    found: dict[str, Any] = {
        "score": score,
        "score_low": low,
        "score_high": high,
        "tokens": fmean(answer["tokens"] for answer in answers),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "ended": fmean(answer["ended"] for answer in answers),
        "hangul": fmean(hangul_share(answer["text"]) for answer in answers),
    }
    pairs = [(row[name]["text"], row["reference"]) for row in rows if row["reference"] is not None]
    if pairs:
        texts, references = zip(*pairs, strict=True)
        found |= {"chrf": chrf(texts, references), "bleu": bleu(texts, references)}
        found |= {"rouge_l": rouge_l(texts, references), "references": len(pairs)}
    return found


def _wins(rows: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, float]:
    """How often the reward model prefers the answer of `one`; a draw counts half. 95 % interval (Wilson)."""
    gaps = [row[one]["score"] - row[other]["score"] for row in rows]
    accuracy = accuracy_of([0.5 if gap == 0 else float(gap > 0) for gap in gaps], [row["prompt"] for row in rows])
    return {"share": accuracy.accuracy, "low": accuracy.interval[0], "high": accuracy.interval[1], "n": len(rows)}


def _history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]


# --- What to worry about -------------------------------------------------------------------------


def worries(report: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, str]]:
    """What a careful reader would doubt in these figures, by rule: `sign`, what was seen, and `advice`."""
    sft, ppo, win, kl = (*(report["metrics"][n] for n in ("sft", "ppo")), report["wins"]["ppo over sft"], report["kl"])
    found: list[tuple[str, str]] = []
    limit = 2 * settings["kl_target"] if settings.get("kl_target") else 20.0
    undecided = win["low"] <= 0.5 <= win["high"]
    if kl["high"] < 0.1 or (undecided and kl["mean"] <= limit):
        found.append(
            (
                f"PPO can't be told from SFT: it wins {win['share']:.0%} [{win['low']:.0%}, {win['high']:.0%}] of "
                f"{win['n']} prompts, KL {kl['mean']:.2f} nats.",
                "Train for longer, raise learning_rate, or lower kl_coef; look at objective/scores over the updates.",
            )
        )
    if win["high"] < 0.5:
        found.append(
            (f"PPO's answers score worse than SFT's: it wins {win['share']:.0%}.", "Lower learning_rate; look at KL.")
        )
    if kl["mean"] > limit:
        found.append(
            (
                f"The policy is {kl['mean']:.1f} nats a response from SFT (over {limit:g}).",
                "It may have left the language: read the answers; raise kl_coef, or set kl_target.",
            )
        )
    if ppo["tokens"] > 1.5 * sft["tokens"]:
        found.append(
            (
                f"Answers grew from {sft['tokens']:.0f} to {ppo['tokens']:.0f} tokens.",
                "The reward model may pay for length: `kochat reward eval` compares it with 'the longer answer wins'.",
            )
        )
    if ppo["distinct_2"] < 0.7 * sft["distinct_2"]:
        found.append(
            (
                f"PPO repeats itself: distinct-2 fell from {sft['distinct_2']:.2f} to {ppo['distinct_2']:.2f}.",
                "One answer for everything is what a narrow reward model asks for: read the answers side by side.",
            )
        )
    if ppo["ended"] < 0.8 * sft["ended"]:
        found.append(
            (
                f"Answers that end fell from {sft['ended']:.0%} to {ppo['ended']:.0%}.",
                "Set missing_eos_penalty, or raise response_length.",
            )
        )
    if ppo["hangul"] < 0.9 * sft["hangul"]:
        found.append((f"The share of Hangul fell to {ppo['hangul']:.0%}.", "Read the answers; raise kl_coef."))
    evaluation = Path(settings["reward_model_path"]) / "evaluation" / "evaluation.json"
    if not evaluation.is_file():
        found.append(
            (
                "Nobody has looked at how far the reward model can be trusted.",
                f"kochat reward eval {settings['reward_model_path']} FILE, with rankings that it was not trained on.",
            )
        )
    else:
        baselines = json.loads(evaluation.read_text(encoding="utf-8"))["baselines"]
        for name, rule in baselines.items():
            if not rule["beaten"]:
                found.append(
                    (
                        f"The reward model is no better than the rule '{name}'.",
                        "PPO will learn the rule: docs/reward.md.",
                    )
                )
    return [{"sign": sign, "advice": advice} for sign, advice in found]


# --- The page ------------------------------------------------------------------------------------

CURVES = {
    "sft": {"loss": "SFT loss", "eval_loss": "SFT held-out loss"},
    "reward": {"loss": "reward model loss", "eval_accuracy": "reward model held-out pair accuracy"},
    "ppo": {
        "objective/scores": "PPO score",
        "objective/kl": "PPO KL from SFT, nats a response",
        "objective/response_tokens": "PPO response tokens",
        "policy/entropy_avg": "PPO entropy, nats a token",
    },
}


def write_report(report: dict[str, Any], folder: str | Path) -> Path:
    """Write report.json and report.html, which needs nothing else, into `folder`; an older report is renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.html"):
        set_aside(folder / name)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_page(report), encoding="utf-8")
    return page


def render_page(report: dict[str, Any]) -> str:
    """The page as one HTML text, with its plots in it."""
    template = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    curves = [
        (title, _curve(report["curves"][stage], key))
        for stage, titles in CURVES.items()
        for key, title in titles.items()
    ]
    plots = [(title, _svg(lambda axes, xy=xy: axes.plot(*xy))) for title, xy in curves if len(xy[0]) > 1]
    numbers = [(title, y[0]) for title, (_, y) in curves if len(y) == 1]
    scores = {name: [row[name]["score"] for row in report["answers"]] for name in MODELS}
    spread = _svg(lambda axes: _histogram(axes, scores))
    by_kl = _svg(lambda axes: _against(axes, report["curves"]["ppo"]))
    reliability = Path(report["run"]["reward"]) / "evaluation" / "reliability.png"
    image = base64.b64encode(reliability.read_bytes()).decode() if reliability.is_file() else None
    return Template(template, autoescape=True).render(
        report=report, models=MODELS, plots=plots, numbers=numbers, spread=spread, by_kl=by_kl, reliability=image
    )


def _curve(history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry.get("step", i), entry[key]) for i, entry in enumerate(history) if key in entry]
    return [x for x, _ in points], [y for _, y in points]


def _histogram(axes: Any, scores: dict[str, list[float]]) -> None:
    for (name, values), color in zip(scores.items(), ("0.6", "#4a90d9", "#e0802b"), strict=True):
        axes.hist(values, bins=24, histtype="step", linewidth=1.6, label=name, color=color)
    axes.set(xlabel="reward model's score", ylabel="answers")
    axes.legend(frameon=False, labelcolor="#888")


def _against(axes: Any, history: Sequence[dict[str, Any]]) -> None:
    axes.plot(_curve(history, "objective/kl")[1], _curve(history, "objective/scores")[1], "o-", markersize=3)
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
        axes.set_prop_cycle(color=["#4a90d9"])
        draw(axes)
        axes.grid(alpha=0.25)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)  # as wide as its place
