"""What labels buy: the reward model's held-out accuracy against the number of rankings that were judged.

    make demo
    python benchmarks/labels.py --plot docs/labels.png      # goes on where it was stopped

Needs outputs/demo. Its rankings for training are the pool, and nobody knows their order. An annotator (`Annotator`)
judges 25 of them, 50 and so on up to 800, in the order of `kochat label`'s queue, and a reward model is trained on each
set from scratch by configs/tiny/reward.yaml: the demo's but for the rankings and the seed.

- `random`: the sets are the beginnings of one random order.
- `uncertain`: the first 25 are the random ones. Then the model that was trained on a set scores the pool, and those of
  which it is least certain join, up to the next size.

Every model takes the config's 400 steps, so that all of them train as long; 25 rankings are seen 200 times then, and
800 of them 8 times. The accuracy is that of pairs as `kochat reward eval` counts it, on the rankings of held-out
questions, and on the demo's hard pairs, where both answers are polite and one is wrong. The seed drives the random
order, the annotator's errors and the training.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kochat_trl.desk.evaluation.metrics import scored_pairs, wins
from kochat_trl.desk.evaluation.scoring import read_rankings, score_rankings
from kochat_trl.desk.labels.export import ranking_records
from kochat_trl.desk.labels.items import Item, read_items, score_items
from kochat_trl.desk.labels.journal import Journal, Judgement, Picked, now
from kochat_trl.desk.labels.queue import Queue
from kochat_trl.desk.sample.sample import Judge, judge_of
from kochat_trl.desk.statistics import half_interval
from kochat_trl.desk.workflow.pipeline import as_markdown, cell
from kochat_trl.desk.writers import to_json, write_records
from kochat_trl.errors import UserError, run
from kochat_trl.files import new_file

SIZES = (25, 50, 100, 200, 400, 800)
ORDERS = ("random", "uncertain")
SEEDS = (0, 1, 2)
POOL = "outputs/demo/data/kochatgpt_2_RM.jsonl"
MEASURED = {
    "held-out": "outputs/demo/data/kochatgpt_2_RM.heldout.jsonl",
    "hard": "outputs/demo/data/kochatgpt_2_RM.hard.jsonl",
}
Figures = dict[str, float]  # of a model: its accuracy on each of MEASURED


@dataclass(frozen=True)
class Annotator:
    """Ranks answers as the judge scores them, tied where the scores are, and with probability `error` in any order,
    each as likely (the right one, too).

    What is said of an item hangs on the item and the seed alone: whenever it is asked, it is the same.
    """

    judge: Judge
    error: float
    seed: int
    name: str = "simulated"

    def rank(self, item: Item, picked: Picked) -> Judgement:
        rng, indices = random.Random(f"{self.seed}/{item.id}"), tuple(range(len(item.answers)))
        if rng.random() < self.error:
            tiers = tuple((i,) for i in rng.sample(indices, len(indices)))
        else:
            scores = [self.judge.score(item.prompt.prompt, answer, ended=True) for answer in item.answers]
            best_first = sorted(set(scores), reverse=True)
            tiers = tuple(tuple(i for i in indices if scores[i] == score) for score in best_first)
        return Judgement(item, tiers, self.name, now(), 0.0, indices, picked)


def curve(folder: Path, order: str, annotator: Annotator, items: Sequence[Item]) -> list[Figures]:
    """The figures at each size; `folder` keeps the journal, and what was trained, also on the random beginning that
    both orders share."""
    found: list[Figures] = []
    model = folder
    with Journal(folder / f"{order}.jsonl") as journal:
        for size in SIZES:
            if (missing := size - len(journal.state.standing)) > 0:
                if order == "uncertain" and found:
                    queue = Queue(items, "uncertain", scores=score_items(str(model), items))
                else:
                    queue = Queue(items, "random", annotator.seed)
                for item, picked in queue.left(journal.state, annotator.name)[:missing]:
                    journal.add(annotator.rank(item, picked))
            model = folder / f"{order if found else 'random'}-{size}"
            found.append(figures_of(model, journal.state.standing[:size], annotator.seed))
            print(model, found[-1], file=sys.stderr, flush=True)
    return found


def figures_of(model: Path, judgements: Sequence[Judgement], seed: int) -> Figures:
    """The figures of the reward model in the folder `model`, which is trained on the judgements if it isn't there."""
    figures, rankings = model / "figures.json", model.with_suffix(".rankings.jsonl")
    if not figures.exists():
        if not rankings.exists():
            write_records(rankings, "array", ranking_records(judgements)[0])
        if not (model / "metrics.json").exists():
            train("--train_files", rankings, "--output_dir", model, "--seed", seed)
        with new_file(figures) as stream:
            stream.write(to_json({name: accuracy(str(model), file) for name, file in MEASURED.items()}))
    return json.loads(figures.read_text(encoding="utf-8"))


def train(*words: object) -> None:
    command = [sys.executable, "recipes/reward.py", "--config", "configs/tiny/reward.yaml", *map(str, words)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"{' '.join(command[1:])} failed; the message is above")


def accuracy(model: str, file: str) -> float:
    return fmean(wins(scored_pairs(score_rankings(model, read_rankings(model, [file])[0]))))


def table_of(curves: dict[str, list[list[Figures]]]) -> str:
    """A row for each size: the accuracy of each order, and by how much `uncertain` is better, seed by seed."""
    lines = [["labels", *(f"{kind}, {column}" for kind in MEASURED for column in (*ORDERS, "difference"))]]
    for i, size in enumerate(SIZES):
        cells = []
        for kind in MEASURED:
            its = [[own[i][kind] for own in curves[order]] for order in ORDERS]
            gaps = [uncertain - at_random for at_random, uncertain in zip(*its, strict=True)]
            cells += [*map(cell, its), cell(gaps)]
        lines.append([str(size), *cells])
    return as_markdown(lines)


def plot(curves: dict[str, list[list[Figures]]], file: str) -> None:
    """Accuracy against labels, with the 95 % intervals over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    titles = {"held-out": "rankings of held-out questions", "hard": "hard pairs: both polite, one wrong"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for order, aside in zip(ORDERS, (0.97, 1.03), strict=True):
            its: list[Any] = [[own[i][kind] for own in curves[order]] for i in range(len(SIZES))]
            x, middle, half = [size * aside for size in SIZES], [*map(fmean, its)], [*map(half_interval, its)]
            axis.errorbar(x, middle, half, fmt="o-", label=order, capsize=2)
        axis.axhline(0.5, color="0.7", linestyle="--", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rankings judged")
    axes[0].set_ylabel("pairs put right")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/labels"), help="default: outputs/labels")
    parser.add_argument("--error", type=float, default=0.1, help="share of rankings in a random order (default: 0.1)")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves there")
    arguments = parser.parse_args()
    judge = judge_of(POOL)
    if judge is None:
        raise UserError(f"{POOL} is not there, or not the demo's; run: make demo")
    items, *_ = read_items([POOL])
    curves: dict[str, list[list[Figures]]] = {order: [] for order in ORDERS}
    for seed in SEEDS:
        annotator, folder = Annotator(judge, arguments.error, seed), arguments.output / f"error{arguments.error:g}"
        for order, its in curves.items():
            its.append(curve(folder / f"seed{seed}", order, annotator, items))
    print(table_of(curves))
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    run(main)
