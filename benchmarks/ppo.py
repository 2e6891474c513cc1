"""A PPO update, side by side: four adapters on one backbone, and TRL 1.12's PPOTrainer.

    python benchmarks/ppo.py --json ppo.json

kogpt2's shape with random weights, LoRA of rank 16 on all linear layers, float32 on the CPU, no gradient checkpointing.
The same 8 prompts an update for all, of lengths as in KoChatGPT's file, 64 response tokens, 4 epochs, one mini-batch.
Each contender runs in a process of its own; its memory is the peak above what importing takes. The first update warms
up, and the median of the others counts.

- `adapter`, `shared`, `int8`, `bf16`: ours; the value function has an adapter of its own, or is a head on the policy;
  `adapter` on an int8 base; and on one in bfloat16, under autocast, as `--bf16 true` has it.
- `trl`: its value and reward models are whole, as in its own examples, and the value model is trained whole.
- `trl_lora_value`: its value model has a LoRA adapter too.

In all of them a mini-batch of 8 goes through a model in one pass. `evaluate` is no part of an update: greedy answers to
8 prompts and their scores, once, in the end.

    python benchmarks/ppo.py --growth

Peak memory of `adapter` on a small model (4 layers, 256 wide, 8,000 words) after 5 and after 55 updates, over ten times
as many prompts, and with longer and longer responses.

    python benchmarks/ppo.py --products

How much longer than ours (`models/linear.py`) torch's own product takes, on each of kogpt2's layers: few rows are those
of sampling, many those of a step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any
from unittest.mock import patch

from kochat_trl.desk.workflow.memory import tokenizer_of_four
from kochat_trl.models import linear as linear_module
from kochat_trl.models.linear import linear
from kochat_trl.models.loading import add_lora, load_causal_lm
from kochat_trl.ppo.roles import one_backbone
from kochat_trl.ppo.rollout import draw_prompts
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.settings.keys import ModelArguments
from kochat_trl.settings.ppo import PPOConfig

import torch
import torch.nn.functional as F
from common import KOGPT2, machine, memory, run_alone, write_json
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

CONTENDERS = ("adapter", "shared", "int8", "bf16", "trl", "trl_lora_value")
SMALL = {"vocab_size": 8000, "n_embd": 256, "n_layer": 4, "n_head": 4}
# Tokens of KoChatGPT's 11,990 prompts, template included: every twentieth quantile.
LENGTHS = [26, 30, 31, 31, 32, 32, 33, 33, 34, 34, 35, 35, 36, 37, 37, 38, 39, 41, 42, 46, 96]
LORA = ModelArguments(use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, dtype="float32")


def make_prompts(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    # The longest of all is one in 12,000, and the shortest too.
    drawn = torch.randint(1, len(LENGTHS) - 1, (count,), generator=generator).tolist()
    rows = [torch.randint(6, 8000, (LENGTHS[i],), generator=generator).tolist() for i in drawn]
    return Dataset.from_dict({"input_ids": rows})


def make_tokenizer() -> Any:
    tokenizer = tokenizer_of_four()
    tokenizer.padding_side = "left"
    return tokenizer


def write_stages(folder: str, **shape: int) -> None:
    """A base, an SFT adapter and a reward adapter with its head, in files, as the recipes leave them."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**KOGPT2 | shape)).save_pretrained(f"{folder}/base")
    sft = add_lora(GPT2LMHeadModel.from_pretrained(f"{folder}/base"), LORA)
    sft.save_pretrained(f"{folder}/sft")
    add_lora(reward_model(folder), LORA).save_pretrained(f"{folder}/reward")


def reward_model(folder: str) -> Any:
    return GPT2ForSequenceClassification.from_pretrained(f"{folder}/base", num_labels=1)


def settings(folder: str, updates: int, length: int) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/output",
        "per_device_train_batch_size": 8,
        "total_episodes": 8 * updates,
        "response_length": length,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "learning_rate": 1e-5,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "local_rollout_forward_batch_size": 8,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def build_ours(name: str, folder: str, updates: int, length: int, phases: dict[str, list[float]]) -> Any:
    class Timed(PPOTrainer):
        """Adds up the seconds of sampling, scoring and steps."""

    def timed(method: str) -> None:
        inner = getattr(PPOTrainer, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = inner(self, *args, **kwargs)
            phases[method].append(time.perf_counter() - started)
            return result

        setattr(Timed, method, call)

    for method in ("sample", "score", "step"):
        timed(method)
    dtype = "bfloat16" if name == "bf16" else "float32"
    precision = ModelArguments(dtype=dtype, load_in_8bit=name == "int8", llm_int8_threshold=0.0)
    backbone = load_causal_lm(f"{folder}/base", precision, make_tokenizer())
    value = "shared" if name == "shared" else "adapter"
    roles = one_backbone(backbone, f"{folder}/sft", f"{folder}/reward", value)
    values = settings(folder, updates, length) | {"bf16": name == "bf16"}
    return Timed(PPOConfig(value_model=value, **values), make_tokenizer(), roles, None, None, make_prompts(8 * updates))


def build_trl(name: str, folder: str, updates: int, length: int) -> Any:
    from trl.experimental.ppo import PPOConfig as TRLConfig
    from trl.experimental.ppo import PPOTrainer as TRLTrainer

    value = reward_model(folder)
    return TRLTrainer(
        args=TRLConfig(**settings(folder, updates, length)),
        processing_class=make_tokenizer(),
        model=add_lora(GPT2LMHeadModel.from_pretrained(f"{folder}/base"), LORA),
        ref_model=None,
        reward_model=reward_model(folder),
        value_model=add_lora(value, LORA) if name == "trl_lora_value" else value,
        train_dataset=make_prompts(8 * updates),
    )


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    on_step_end = on_train_begin


def matmul_rate(size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of a square float32 matrix product: the median of some, as the steps' time is."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def read_rate(size: int = 2**29, repeats: int = 10) -> float:
    """Bytes a second that are read from memory, far more than a cache holds: the median of some."""
    numbers, seconds = torch.ones(size // 4), []
    for _ in range(repeats):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds)


def time_products() -> None:
    """Milliseconds of torch's product and of ours, and their ratio: the least of some, side by side."""
    width, words, ratios = KOGPT2["n_embd"], KOGPT2["vocab_size"], []
    print(f"{'layer':>13} {'rows':>5} {'torch':>7} {'ours':>7}")
    for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (width, words)):
        weights = [torch.randn(inputs, outputs).T for _ in range(1 if outputs == words else 8)]  # as GPT-2's layers lie
        for rows in (2, 8, 32, 128, 800):
            x, found = torch.randn(rows, inputs), []
            for product in (F.linear, linear):
                seconds = []
                for _ in range(12):
                    started = time.perf_counter()
                    for weight in weights:
                        product(x, weight)
                    seconds.append((time.perf_counter() - started) / len(weights) * 1e3)
                found.append(min(seconds))
            ratios.append(found[0] / found[1])
            print(
                f"{inputs:>5} → {outputs:>5} {rows:>5} {found[0]:7.2f} {found[1]:7.2f} {ratios[-1]:6.2f}×", flush=True
            )
    print(f"torch's takes {min(ratios):.1f} to {max(ratios):.1f} times as long on {machine()['cpu']}")


def run_contender(name: str, folder: str, updates: int, length: int) -> dict[str, Any]:
    baseline, phases, clock = memory(), defaultdict(list), Clock()
    ours = not name.startswith("trl")
    trainer = build_ours(name, folder, updates, length, phases) if ours else build_trl(name, folder, updates, length)
    trainer.add_callback(clock)
    trainer.train()
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)][1:]
    result: dict[str, Any] = {"seconds": statistics.median(seconds), "all_seconds": seconds}
    result["peak_bytes"] = memory() - baseline
    if ours:
        steps = len(phases["step"]) // updates
        found = {key: sum(times) / len(times) * (steps if key == "step" else 1) for key, times in phases.items()}
        evaluation = trainer.evaluate(trainer.train_dataset.select(range(8)))  # as many prompts as an update has
        result["phases"] = found | {"evaluate": evaluation["eval_runtime"]}
    if name == "adapter":
        rate = matmul_rate()
        flops = count_flops(trainer)
        result |= {"step_flops": flops, "matmul_flops_a_second": rate}
        result["flop_fraction"] = flops / statistics.median(phases["step"][4:]) / rate
        # Each token of all rows reads the weights once, the head's too, which are the embedding's.
        weights = [p for name, p in trainer.roles.policy.backbone.named_parameters() if "lora" not in name]
        result |= {"token_bytes": sum(p.nbytes for p in weights), "read_bytes_a_second": read_rate()}
        floor = length * result["token_bytes"] / result["read_bytes_a_second"]
        result |= {"sampling_floor": floor, "sampling_fraction": floor / result["phases"]["sample"]}
    return result


def count_flops(trainer: PPOTrainer) -> float:
    """FLOPs of the matrix products of one step, forward and backward, as torch counts them; the mean of the updates."""
    totals = []
    for update in range(1, trainer.state.global_step):
        args = trainer.args
        rollout = trainer.sample(update, draw_prompts(len(trainer.train_dataset), args.batch_size, args.seed, update))
        plan = rollout.plan(args.mini_batch_size, args.micro_batch_size, args.seed, update, epoch=0)
        trajectory = trainer.score(rollout, plan)
        trajectory.advantages = trajectory.returns = torch.zeros(rollout.mask.shape)
        trajectory.kept = None  # so that its forward passes are counted
        # So that attention is counted too, and the products that are oneDNN's.
        torchs = patch.object(linear_module, "LARGE", sys.maxsize)
        with torchs, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trainer.step(update, rollout, plan[0], trajectory, first=False)
        totals.append(counter.get_total_flops())
        if update == 2:
            break
    return statistics.mean(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--updates", type=int, default=4, help="the first warms up (default: 4)")
    parser.add_argument("--response-length", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--growth", action="store_true", help="how memory grows, on a small model, and nothing else")
    parser.add_argument("--products", action="store_true", help="torch's matrix products beside ours, and nothing else")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.products:
        time_products()
        return
    if arguments.run:
        name, folder = arguments.run
        print(json.dumps(run_contender(name, folder, arguments.updates, arguments.response_length)))
        return

    def contender(name: str, folder: str, updates: int, length: int) -> dict[str, Any]:
        return run_alone(__file__, "--run", name, folder, "--updates", updates, "--response-length", length)

    if arguments.growth:
        with tempfile.TemporaryDirectory() as folder:
            write_stages(folder, **SMALL)
            for updates, length in ((5, 64), (55, 64), (5, 128), (5, 256), (5, 512)):
                peak = contender("adapter", folder, updates, length)["peak_bytes"]
                print(f"{updates:3} updates of {length:3} tokens: {peak / 2**20:5.0f} MiB", flush=True)
        return

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_stages(folder)
        for name in arguments.only:
            row = figures[name] = contender(name, folder, arguments.updates, arguments.response_length)
            phases = "  ".join(f"{key} {value:.1f}" for key, value in row.get("phases", {}).items())
            print(f"{name:15} {row['seconds']:6.1f} s  {row['peak_bytes'] / 2**30:5.2f} GiB  {phases}", flush=True)
    if "trl" in figures:
        figures["ratios"] = {
            name: {
                "speed": figures["trl"]["seconds"] / figures[name]["seconds"],
                "memory": figures[name]["peak_bytes"] / figures["trl"]["peak_bytes"],
            }
            for name in arguments.only
            if not name.startswith("trl")
        }
        print("ratios", json.dumps(figures["ratios"], indent=2))
    if "adapter" in figures:
        figures["flop_fraction"] = figures["adapter"]["flop_fraction"]
        print(f"update phase at {figures['flop_fraction']:.0%} of the rate of a 2048³ matrix product")
        floor, part = (figures["adapter"][key] for key in ("sampling_floor", "sampling_fraction"))
        print(f"sampling: {floor:.1f} s to read the weights once for each token, {part:.0%} of what it takes")
    figures["machine"] = machine()
    write_json(figures, arguments.json)


if __name__ == "__main__":
    main()
