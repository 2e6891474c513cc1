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
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError, run

from rich.console import Console
from rich.table import Table

OUTPUT = Path("outputs/demo")
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


def judge_models(seed: int) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
    """Mean judge score, with its interval, of base, SFT and PPO on every held-out prompt; four answers of each."""
    from kochat_trl.data.records import Prompt
    from kochat_trl.desk.answers.generate import decoding, generate_answers
    from kochat_trl.desk.sample.sample import Judge, make_questions
    from kochat_trl.desk.statistics import mean_interval
    from kochat_trl.models.loading import load_policy
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.settings.keys import ModelArguments

    train, held_out = make_questions(seed)
    judge, prompts = Judge([*train, *held_out]), [question.prompt for question in held_out]
    asked, settings = [Prompt(prompt) for prompt in prompts], decoding("sample", ["max_new_tokens=24"])
    shown = [i * len(prompts) // 4 for i in range(4)]
    scores, samples = {}, {}
    for name, folder in {"base": "base", "sft": "sft", "ppo": "merged"}.items():
        path = str(OUTPUT / folder)
        tokenizer = load_tokenizer(path)
        model = load_policy(path, ModelArguments(dtype="float32"), tokenizer)
        answers = generate_answers(model, tokenizer, asked, settings, seed=seed)
        points = [judge.score(p, a.text, a.ended) for p, a in zip(prompts, answers, strict=True)]
        mean, low, high = mean_interval(points)
        scores[name] = {"mean": mean, "low": low, "high": high, "n": len(points)}
        samples[name] = [answers[i].text for i in shown]
    return scores, samples, [prompts[i] for i in shown]


def show(summary: dict[str, Any], samples: dict[str, list[str]], prompts: list[str]) -> None:
    figures = Table(title=f"seed {summary['seed']}, {summary['seconds']['total']:.0f} s", show_header=False)
    figures.add_row("SFT eval loss", f"{summary['sft']['eval_loss']:.3f} nats a token")
    figures.add_row("RM held-out pair accuracy", f"{summary['reward']['accuracy']:.3f}")
    ppo = summary["ppo"]
    figures.add_row("PPO reward, first → last update", f"{ppo['reward_first']:.2f} → {ppo['reward_last']:.2f}")
    figures.add_row("PPO KL from SFT, last update", f"{ppo['kl_last']:.2f} nats a response")
    for name, score in summary["judge"].items():
        interval = f"{score['mean']:.3f}  [{score['low']:.3f}, {score['high']:.3f}]  n = {score['n']}"
        figures.add_row(f"judge, {name} (0 to 1, 95 % interval)", interval)
    console.print(figures)

    answers = Table(title="held-out prompts, sampled at temperature 1", show_lines=True)
    for column in ("prompt", *samples):
        answers.add_column(column, overflow="fold")
    for row in zip(prompts, *samples.values(), strict=True):
        answers.add_row(*row)
    console.print(answers)


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
    scores, samples, prompts = judge_models(seed)
    seconds["total"] = round(time.perf_counter() - started, 1)

    def metrics(stage: str) -> dict[str, Any]:
        return json.loads((OUTPUT / stage / "metrics.json").read_text(encoding="utf-8"))

    updates = [entry for entry in metrics("ppo")["history"] if "objective/scores" in entry]
    summary = {
        "seed": seed,
        "seconds": seconds,
        "sft": {"eval_loss": metrics("sft")["eval_loss"]},
        "reward": {"accuracy": metrics("reward")["eval_accuracy"]},
        "ppo": {
            "reward_first": updates[0]["objective/scores"],
            "reward_last": updates[-1]["objective/scores"],
            "kl_last": updates[-1]["objective/kl"],
        },
        "judge": scores,
    }
    text = json.dumps(summary, ensure_ascii=False, indent=2)
    (OUTPUT / "summary.json").write_text(text + "\n", encoding="utf-8")
    show(summary, samples, prompts)
    console.print(f"Written to {OUTPUT}/summary.json; the model is in {OUTPUT}/merged.")


if __name__ == "__main__":
    run(main)
