"""What the loss and the reading of the rankings do to a reward model, on the sample data over three seeds.

    python benchmarks/reward_losses.py --json reward_losses.json

For each seed: sample data, the tiny base of the demo, and a reward model for each variant, by the recipe itself. All
are judged on the same held-out rankings, read best first. Everything is kept in outputs/reward_losses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from kochat_trl.desk.sample.sample import write_sample_data
from kochat_trl.errors import UserError

OUTPUT = Path("outputs/reward_losses")
VARIANTS = {
    "pairwise": [],
    "listwise": ["--loss", "listwise", "--center_rewards_coefficient", "None"],
    "pairwise, rank_of": ["--ranking_order", "rank_of"],
}


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def train(seed: int, name: str, flags: list[str]) -> Path:
    """Train one variant and return its folder; the base of a seed is made with the first."""
    folder = OUTPUT / f"seed{seed}"
    data, base, model = folder / "data", folder / "base", folder / name.replace(", ", "-")
    if not base.exists():
        text = write_sample_data(data, seed)["text"]
        run("scripts/make_tiny_base.py", "--text", text, "--output", base, "--seed", seed)
    files = ["--train_files", data / "kochatgpt_2_RM.jsonl", "--eval_files", data / "kochatgpt_2_RM.heldout.jsonl"]
    command = ["recipes/reward.py", "--config", "configs/tiny/reward.yaml", "--model_name_or_path", base]
    run(*command, *files, "--output_dir", model, "--seed", seed, *flags)
    return model


def held_out_accuracy(model: Path, seed: int) -> float:
    """The share of held-out pairs, read best first, that the model orders right."""
    from kochat_trl.data.readers import read_records
    from kochat_trl.data.records import parse_preference
    from kochat_trl.desk.curation.build import gather_scores

    file = OUTPUT / f"seed{seed}/data/kochatgpt_2_RM.heldout.jsonl"
    rankings = [parse_preference(raw) for raw in read_records(file)]
    completions = list(zip(*(ranking.completions for ranking in rankings), strict=True))
    scores = gather_scores(str(model), [ranking.prompt for ranking in rankings], completions)
    right = [
        scores[better][i] > scores[worse][i]
        for i, ranking in enumerate(rankings)
        for better, worse, _ in ranking.pairs()
    ]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if OUTPUT.exists():
        raise UserError(f"{OUTPUT} exists already; move it away first")
    accuracy: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}
    for seed in arguments.seeds:
        for name, flags in VARIANTS.items():
            accuracy[name][seed] = held_out_accuracy(train(seed, name, flags), seed)
    print("held-out pair accuracy")
    for name, by_seed in accuracy.items():
        cells = "  ".join(f"{value:.3f}" for value in by_seed.values())
        print(f"{name:18} {cells}  mean {statistics.mean(by_seed.values()):.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(accuracy, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from kochat_trl.errors import run as run_main

    run_main(main)
