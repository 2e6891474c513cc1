"""An epoch of reward modelling, side by side: rankings whole, TRL's pairs, and KoChatGPT's rows of 512 tokens.

    python benchmarks/reward.py --json reward.json

kogpt2's shape with random weights, LoRA in float32 on the CPU, gradient checkpointing off, the same rankings of three
and as many of them a step for all. The lengths are those of 526 real Korean pairs: 65 tokens with the template on
average, 118 at most. Each contender runs in a process of its own; its memory is the peak above what importing takes.

- `ours`: RankingTrainer, each completion once, batches of like length.
- `trl`: TRL's RewardTrainer on the three pairs of each ranking.
- `upstream`: the same pairs, every row padded to 512 tokens, as KoChatGPT does.
"""

import argparse
import json
import random
import tempfile
import time
from typing import Any

from kochat_trl.desk.workflow.memory import tokenizer_of_four
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32
from kochat_trl.reward.trainer import RankingTrainer
from kochat_trl.settings.keys import ModelArguments, RecipeArguments

import torch
from common import KOGPT2, machine, memory, run_alone, write_json
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

CONTENDERS = ("ours", "trl", "upstream")
FULL_EPOCH = 10_220  # rankings in KoChatGPT's file


def make_rankings(count: int) -> list[dict[str, Any]]:
    """Rankings of three, of random tokens: a prompt takes 25 to 45 of 65 on average, and of 118 at most."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(6, 51200) for _ in range(rng.randint(25, 45))]
        lengths = [min(118 - len(prompt), 4 + int(rng.expovariate(1 / 28))) for _ in range(3)]
        ids = [prompt + [rng.randrange(6, 51200) for _ in range(length)] + [1] for length in lengths]
        rows.append({"completion_ids": ids, "ranks": [0, 1, 2], "length": max(map(len, ids))})
    return rows


def make_pairs(rankings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"chosen_ids": row["completion_ids"][better], "rejected_ids": row["completion_ids"][worse]}
        for row in rankings
        for better, worse in ((0, 1), (0, 2), (1, 2))
    ]


class _Timer(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def run_contender(name: str, rankings_a_step: int, steps: int) -> dict[str, Any]:
    """Train two passes over `rankings_a_step · steps` rankings; the figures are of the second."""
    torch.manual_seed(0)
    baseline = memory()
    model_args = ModelArguments(use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, dtype="float32")
    model = GPT2ForSequenceClassification(GPT2Config(**KOGPT2, num_labels=1, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))
    model = add_lora(model, model_args)
    rankings = make_rankings(rankings_a_step * steps)
    timer = _Timer()
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=rankings_a_step * (1 if name == "ours" else 3),
            train_sampling_strategy="group_by_length" if name == "ours" else "sequential",
            pad_to_multiple_of=512 if name == "upstream" else None,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = rankings if name == "ours" else make_pairs(rankings)
        kwargs = {"model": model, "args": args, "train_dataset": Dataset.from_list(rows)}
        kwargs |= {"processing_class": tokenizer_of_four(), "callbacks": [timer]}
        trainer = (
            RankingTrainer(RecipeArguments(train_files=[]), **kwargs) if name == "ours" else RewardTrainer(**kwargs)
        )
        cast_trainable_to_float32(trainer.model)
        first = trainer.data_collator([trainer.train_dataset[i] for i in range(args.per_device_train_batch_size)])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), first).item()
        trainer.train()
    seconds = sum(timer.seconds[steps:]) / (rankings_a_step * steps)
    return {
        "seconds_a_ranking": seconds,
        "seconds_an_epoch": seconds * FULL_EPOCH,
        "peak_bytes": memory() - baseline,
        "loss_of_the_first_rankings": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--rankings", type=int, default=4, help="a step (default: 4)")
    parser.add_argument(
        "--steps", type=int, default=8, help="of the measured pass; KoChatGPT's way takes 1 (default: 8)"
    )
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_contender(arguments.run, arguments.rankings, arguments.steps)))
        return

    figures = {}
    for name in CONTENDERS:
        steps = 1 if name == "upstream" else arguments.steps
        figures[name] = run_alone(__file__, "--run", name, "--rankings", arguments.rankings, "--steps", steps)
    ours, trl, upstream = (figures[name] for name in CONTENDERS)
    losses = [figures[name]["loss_of_the_first_rankings"] for name in CONTENDERS]
    if max(losses) - min(losses) > 1e-5:
        raise SystemExit(f"the contenders don't compute the same loss: {losses}")
    figures["ratios"] = {
        "upstream": upstream["seconds_a_ranking"] / ours["seconds_a_ranking"],
        "trl": trl["seconds_a_ranking"] / ours["seconds_a_ranking"],
        "memory": ours["peak_bytes"] / trl["peak_bytes"],
    }
    figures["machine"] = machine()
    for name in CONTENDERS:
        row = figures[name]
        print(
            f"{name:9} {row['seconds_a_ranking']:7.3f} s a ranking  {row['seconds_an_epoch'] / 3600:6.2f} h an epoch  "
            f"{row['peak_bytes'] / 2**30:5.2f} GiB  loss {row['loss_of_the_first_rankings']:.6f}"
        )
    print("ratios", {key: round(value, 3) for key, value in figures["ratios"].items()})
    write_json(figures, arguments.json)


if __name__ == "__main__":
    main()
