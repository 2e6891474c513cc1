"""The whole pipeline at toy size, with no network: data → base → SFT → reward model → PPO → merge → report → table.

    python scripts/demo.py --seed 0        # what `make demo` runs; from the base on it is `kochat run configs/tiny`

Everything goes to outputs/demo; an earlier demo there is renamed, not deleted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError, run

from rich.console import Console
from rich.table import Table
from rich.text import Text

OUTPUT = Path("outputs/demo")
MODELS = {"base": "base", "sft": "sft", "ppo": "merged"}  # and their folders
console = Console()


def run_stages(seed: int) -> dict[str, float]:
    """Make data and a base, and run the pipeline on them; return the seconds of each stage."""
    from kochat_trl.desk.sample.sample import write_sample_data
    from kochat_trl.desk.workflow.pipeline import make_plan, run_plan

    started = time.perf_counter()
    text = str(write_sample_data(OUTPUT / "data", seed)["text"])
    base = ["scripts/make_tiny_base.py", "--text", text, "--output", str(OUTPUT / "base"), "--seed", str(seed)]
    if subprocess.run([sys.executable, *base]).returncode:
        raise UserError("the tiny base could not be made; the message is above")
    seconds = {"data and base": round(time.perf_counter() - started, 1)}
    return seconds | run_plan(make_plan("configs/tiny", seed=seed).steps, console)


def judge_models(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How base, SFT and PPO answer every held-out question: `judge` (sampled) and `greedy`, as the summary has them.

    And five questions, every n-th of them, with each model's sampled answer and whether it is right.
    """
    from kochat_trl.data.records import Prompt
    from kochat_trl.desk.answers.generate import decoding, generate_answers
    from kochat_trl.desk.sample.sample import Judge, make_questions
    from kochat_trl.desk.statistics import mean_interval
    from kochat_trl.models.loading import load_policy
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.settings.keys import ModelArguments

    train, held_out = make_questions(seed)
    judge, prompts = Judge([*train, *held_out]), [question.prompt for question in held_out]
    facts = [question.full for question in held_out]
    shown = [i * len(prompts) // 5 for i in range(5)]
    found: dict[str, Any] = {"judge": {}, "greedy": {}}
    samples: dict[str, Any] = {prompts[i]: {} for i in shown}
    for name, folder in MODELS.items():
        tokenizer = load_tokenizer(str(OUTPUT / folder))
        model = load_policy(str(OUTPUT / folder), ModelArguments(dtype="float32"), tokenizer)
        for key, preset in {"judge": "sample", "greedy": "greedy"}.items():
            settings = decoding(preset, max_new_tokens=24)
            answers = generate_answers(model, tokenizer, [Prompt(p) for p in prompts], settings, seed=seed)
            given = [(prompt, answer.text, answer.ended) for prompt, answer in zip(prompts, answers, strict=True)]
            verdicts = [judge.verdict(*each) for each in given]
            found[key][name] = _named(*mean_interval([judge.score(*each) for each in given])) | {
                "n": len(given),
                "right": _share([verdict["correct"] for verdict in verdicts], facts),
                "polite": _share([verdict["polite"] for verdict in verdicts], facts),
            }
            if preset == "sample":
                for i in shown:
                    samples[prompts[i]][name] = (answers[i].text, verdicts[i]["correct"])
    return found, samples


def _named(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def _share(held: Sequence[float], facts: Sequence[str]) -> dict[str, float]:
    """The share of answers of which something holds. Those about one fact are not taken for independent."""
    from kochat_trl.desk.evaluation.metrics import accuracy_of

    found = accuracy_of(held, facts)
    return _named(found["accuracy"], *found["interval"])


def hard_pairs() -> dict[str, float]:
    """How often the reward model prefers the right answer to one that is as polite and wrong, on held-out questions."""
    from kochat_trl.desk.evaluation.metrics import scored_pairs, wins
    from kochat_trl.desk.evaluation.scoring import read_rankings, score_rankings

    reward, file = str(OUTPUT / "reward"), str(OUTPUT / "data/kochatgpt_2_RM.hard.jsonl")
    pairs = scored_pairs(score_rankings(reward, read_rankings(reward, [file])[0]))
    return _share(wins(pairs), [pair.better.text for pair in pairs]) | {"n": len(pairs)}


def show(summary: dict[str, Any], samples: dict[str, Any]) -> None:
    """Before and after, five questions, and what PPO did."""
    sampled, greedy, ppo = summary["judge"], summary["greedy"], summary["ppo"]

    def cell(share: dict[str, float], form: str = ".0%") -> str:
        return f"{share['mean']:{form}}  [dim]{share['low']:{form}}–{share['high']:{form}}[/]"

    questions = f"{sampled['ppo']['n']} held-out questions"
    columns = ("", "right, sampled", "right, greedy", "polite", "judge, 0 to 1")
    figures = Table(*columns, title=f"{questions}, 95 % intervals; seed {summary['seed']}")
    for name in MODELS:
        own = sampled[name]
        figures.add_row(name, cell(own["right"]), cell(greedy[name]["right"]), cell(own["polite"]), cell(own, ".2f"))
    console.print(figures)
    answers = Table(title="every n-th of them, sampled at temperature 1", show_lines=True)
    for column in ("", *MODELS):
        answers.add_column(column, overflow="fold")
    for prompt, given in samples.items():
        marks = (Text(f"{'✓' if right else '✗'} {text or '(nothing)'}") for text, right in given.values())
        answers.add_row(prompt, *marks)
    console.print(answers)
    before, after = (sampled[name] for name in ("sft", "ppo"))
    console.print(
        f"The reward model orders {summary['reward']['accuracy']:.0%} of held-out pairs as they should be, and "
        f"{summary['reward']['hard_pairs']['mean']:.0%} of the hard ones: both answers polite, one of them wrong.\n"
        f"PPO raised the reward from {ppo['reward_first']:.2f} to {ppo['reward_last']:.2f}, {ppo['kl_last']:.1f} nats "
        f"a response away from SFT; with it right answers went from {before['right']['mean']:.0%} to "
        f"{after['right']['mean']:.0%}, and polite ones from {before['polite']['mean']:.0%} to "
        f"{after['polite']['mean']:.0%}."
    )
    console.print(f"All that it changed: {OUTPUT}/report/report.html; the figures: {OUTPUT}/summary.json")
    console.print(f"Talk with it: {Path(sys.executable).parent / 'kochat'} chat {OUTPUT}/merged", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", default=0, type=int)
    seed = parser.parse_args().seed
    os.environ["HF_HUB_OFFLINE"] = "1"
    from kochat_trl.files import set_aside

    set_aside(OUTPUT)

    started = time.perf_counter()
    seconds = run_stages(seed)
    console.rule("[bold]judge")
    judged, samples = judge_models(seed)
    hard = hard_pairs()
    seconds["total"] = round(time.perf_counter() - started, 1)

    def metrics(stage: str) -> dict[str, Any]:
        return json.loads((OUTPUT / stage / "metrics.json").read_text(encoding="utf-8"))

    updates = [entry for entry in metrics("ppo")["history"] if "objective/scores" in entry]
    summary = {
        "seed": seed,
        "seconds": seconds,
        "sft": {"eval_loss": metrics("sft")["eval_loss"]},
        "reward": {"accuracy": metrics("reward")["eval_accuracy"], "hard_pairs": hard},
        "ppo": {
            "reward_first": updates[0]["objective/scores"],
            "reward_last": updates[-1]["objective/scores"],
            "kl_last": updates[-1]["objective/kl"],
        },
    } | judged
    text = json.dumps(summary, ensure_ascii=False, indent=2)
    (OUTPUT / "summary.json").write_text(text + "\n", encoding="utf-8")
    console.rule("[bold]before and after")
    show(summary, samples)


if __name__ == "__main__":
    run(main)
