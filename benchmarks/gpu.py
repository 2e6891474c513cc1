"""What one GPU does, in a few minutes: each stage's speed and memory beside the planner's, TRL's, and sampling.

    python benchmarks/gpu.py --minutes 8 --json gpu.json
    python scripts/tables.py gpu                # gpu.json → docs/hardware.md

Random weights at the shapes of kogpt2 and of Qwen2.5 0.5B, LoRA of rank 16 on all linear layers, no gradient
checkpointing; nothing is read from the Hub. A stage is built as its recipe builds it, from a config. SFT has 8 texts of
512 tokens in a step, the reward model 8 rankings of three, PPO and RLOO 8 answers of 64 tokens to prompts of 96, in an
update of four epochs. The first step warms up, and the median of the others counts.

Each measurement has a process of its own, so that one that fails or runs out of memory is a row with its error. They
come in order of worth; what the minutes don't reach is named. Tokens are those of the texts, and of PPO's answers.

- `trl ppo`, `trl rloo`: TRL's trainers, the same work; policy and value model with LoRA.
- `sampling`: answers alone. `generate` is transformers' own loop, `compiled` the same with a static cache, whose step
  it compiles into a CUDA graph where the model allows it. Our own loop is not compiled.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from kochat_trl.desk.workflow.memory import COMPLETIONS, plan_memory, tokenizer_of_four
from kochat_trl.models.heads import in_float32
from kochat_trl.models.loading import add_lora, load_causal_lm
from kochat_trl.settings.parse import parse_arguments

import torch
from accelerate import PartialState
from common import KOGPT2, machine, run_alone, write_json
from datasets import Dataset
from memory import build, write_configs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    Qwen2Config,
    TrainerCallback,
)

QWEN = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768}
TINY_QWEN = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_QWEN |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
TINY_GPT2 = {"vocab_size": 500, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
# Name → its config, and a tiny one for a dry run.
SHAPES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "kogpt2": (GPT2Config, KOGPT2, TINY_GPT2),
    "qwen2.5-0.5b": (Qwen2Config, QWEN | {"tie_word_embeddings": True}, TINY_QWEN | {"tie_word_embeddings": True}),
}
SIZES = {"rows": 8, "length": 512, "prompt": 96, "response": 64, "steps": 5}
DRY_SIZES = {"rows": 4, "length": 24, "prompt": 8, "response": 8, "steps": 2}
# "bf16" is what the recipes choose: float16 on a card without it.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "float32": {"bf16": False, "fp16": False},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True},
}
STAGES = ("sft", "reward", "ppo", "rloo")
PHASES = {"sft": ["SFT"], "reward": ["reward model"]}  # and of the others those of PPO
RLOO = {"advantages": "rloo", "num_generations": 4}
SAMPLING = {"sampling": "ours", "sampling, generate": "generate", "sampling, compiled": "compiled"}
GB = 2**30


def measurements() -> Iterator[tuple[str, str, str]]:
    """(what, shape, precision), in order of worth."""
    for shape in SHAPES:
        yield from ((stage, shape, "bf16") for stage in STAGES)
        yield from ((what, shape, "bf16") for what in SAMPLING)
        if shape == "kogpt2":
            yield from ((what, shape, "bf16") for what in ("trl ppo", "trl rloo"))
    for precision in ("int8", "float32", "nf4"):
        yield from ((stage, shape, precision) for shape in SHAPES for stage in STAGES)


def write_base(shape: str, folder: Path, dry: bool) -> None:
    config, real, tiny = SHAPES[shape]
    torch.manual_seed(0)
    ids = {"pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 1}
    AutoModelForCausalLM.from_config(config(**(tiny if dry else real) | ids), dtype=torch.bfloat16).save_pretrained(
        folder
    )


def write_stage(what: str, precision: str, base: Path, folder: Path, dry: bool) -> None:
    """The configs of a measurement. On a CPU `bf16` has to be asked for."""
    folder.mkdir()
    of_all = ({"use_cpu": True, "bf16": True} if dry else {}) | PRECISIONS[precision]
    of_ppo = {"num_ppo_epochs": 4} | (RLOO if "rloo" in what else {})
    write_configs(folder, base, DRY_SIZES if dry else SIZES, of_all, of_ppo)


# --- A measurement, in a process of its own -------------------------------------------------------


class Steps(TrainerCallback):
    """The seconds of each step but the first, and the most memory in them."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.ends = every, 0
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends += 1
        if self.ends % self.every:
            return
        self.seconds.append(now() - self._started)
        if len(self.seconds) == 1 and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._started = now()

    def figures(self, tokens: int) -> dict[str, Any]:
        seconds = statistics.median(self.seconds[1:])
        return {"seconds": seconds, "tokens_a_second": tokens / seconds} | peaks()


def now() -> float:
    """Seconds, when the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peaks() -> dict[str, int]:
    if not torch.cuda.is_available():
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def measure_stage(stage: str, folder: Path) -> dict[str, Any]:
    trainer = build("ppo" if stage == "rloo" else stage, folder)
    steps, parts, args = Steps(), defaultdict(list), trainer.args
    trainer.add_callback(steps)
    for name in ("sample", "score", "step") if stage in ("ppo", "rloo") else ():
        setattr(trainer, name, timed(getattr(trainer, name), parts[name]))
    trainer.train()
    if not parts:
        rows = args.per_device_train_batch_size * (COMPLETIONS if stage == "reward" else 1)
        return steps.figures(rows * parse_arguments(stage, str(folder), []).max_length)  # type: ignore[arg-type]
    updates = len(steps.seconds)
    per = {name: sum(seconds[len(seconds) // updates :]) / (updates - 1) for name, seconds in parts.items()}
    return steps.figures(args.batch_size * args.response_length) | {"phases": per}


def timed(function: Any, seconds: list[float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = now()
        result = function(*args, **kwargs)
        seconds.append(now() - started)
        return result

    return call


def measure_trl(method: str, folder: Path) -> dict[str, Any]:
    """TRL's own trainer on the same work: the settings that it has of ours."""
    args = parse_arguments("ppo", str(folder), [])
    training, epochs = args.training, args.training.num_ppo_epochs
    sft = parse_arguments("sft", str(folder), []).model
    base, dtype = str(sft.model_name_or_path), getattr(torch, str(args.model.dtype))
    policy = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), sft)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype, num_labels=1) for _ in range(2)
    )
    shared = {"output_dir": str(folder / "output"), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    names = ("bf16", "fp16", "use_cpu", "per_device_train_batch_size", "gradient_checkpointing", "learning_rate")
    shared |= {name: getattr(training, name) for name in (*names, "temperature")}
    prompt, count = int(args.max_length or 0), training.total_episodes
    if method == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        own = ("num_ppo_epochs", "num_mini_batches", "response_length", "total_episodes")
        own += ("local_rollout_forward_batch_size",)
        tokenizer, every = tokenizer_of_four(), 1
        tokenizer.padding_side = "left"
        config = PPOConfig(**shared, num_sample_generations=0, **{name: getattr(training, name) for name in own})
        rows = Dataset.from_dict({"input_ids": [[5 + i % 100] * prompt for i in range(count)]})
        for scorer in (reward, value):
            in_float32(scorer.score)  # TRL scores without autocast
        value = add_lora(value, sft)
        trainer: Any = PPOTrainer(config, tokenizer, policy, None, reward, rows, value)
    else:
        from methods import letters
        from trl import RLOOConfig, RLOOTrainer

        group, every = training.num_generations, epochs
        config = RLOOConfig(
            **shared,
            max_steps=epochs * count // training.per_device_train_batch_size,
            num_generations=group,
            steps_per_generation=1,
            num_iterations=epochs,
            max_completion_length=training.response_length,
        )
        tokenizer = letters(policy.config.vocab_size)
        texts = [tokenizer.decode([5 + i % 100] * prompt) for i in range(count // group)]
        trainer = RLOOTrainer(
            policy,
            reward,
            config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            reward_processing_classes=letters(policy.config.vocab_size),
        )
    steps = Steps(every)
    trainer.add_callback(steps)
    trainer.train()
    return steps.figures(training.per_device_train_batch_size * training.response_length)


@torch.no_grad()
def measure_sampling(how: str, folder: Path) -> dict[str, Any]:
    """Answers of full length, as many as a rollout has; the first time warms up."""
    args = parse_arguments("ppo", str(folder), [])
    training, rows = args.training, args.training.per_device_train_batch_size
    prompt, length = int(args.max_length or 0), training.response_length
    more: dict[str, Any] = {}
    if how == "ours":
        trainer = build("ppo", folder)

        def sample(number: int) -> None:
            trainer.sample(number, list(range(rows)))

    else:
        sft = parse_arguments("sft", str(folder), []).model
        model: Any = add_lora(load_causal_lm(str(sft.model_name_or_path), args.model, tokenizer_of_four()), sft).eval()
        device = PartialState(cpu=training.use_cpu).device
        model.to(device)
        ids = torch.full((rows, prompt), 5, device=device)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length}
        settings |= {"cache_implementation": "static"} if how == "compiled" else {}
        graphs = getattr(model.get_base_model(), "_can_compile_fullgraph", False) and device.type == "cuda"
        more = {"graphs": graphs} if how == "compiled" else {}
        half = torch.bfloat16 if training.bf16 else torch.float16

        def sample(number: int) -> None:
            with torch.autocast(device.type, half, enabled=training.bf16 or training.fp16):
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    seconds: list[float] = []
    call = timed(sample, seconds)
    for number in range(max(3, training.total_episodes // rows)):
        call(number)
    median = statistics.median(seconds[1:])
    return {"seconds": median, "tokens_a_second": rows * length / median} | peaks() | more


def measure(what: str, folder: Path) -> dict[str, Any]:
    """Its figures, or its error."""
    try:
        if what in SAMPLING:
            return measure_sampling(SAMPLING[what], folder)
        if what.startswith("trl "):
            return measure_trl(what.removeprefix("trl "), folder)
        return measure_stage(what, folder)
    except Exception as error:  # whatever it is, it is this row's alone
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]}


# --- All of them ----------------------------------------------------------------------------------


@cache
def planned(folder: Path) -> dict[str, int]:
    return {footprint.phase: footprint.peak for footprint in plan_memory(folder)}


def card() -> dict[str, Any]:
    """The GPU, and what was measured with which versions."""
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "kochat-trl")
    found: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in packages}}
    found |= {"cuda": torch.version.cuda, "machine": machine(), "card": None}
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        found |= {"card": own.name, "card_bytes": own.total_memory, "capability": f"{own.major}.{own.minor}"}
    return found


def measure_all(minutes: float, only: str, dry: bool) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * minutes
    figures: dict[str, Any] = card() | {"dry_run": dry, "sizes": DRY_SIZES if dry else SIZES}
    figures |= {"rows": [], "not_reached": []}
    with tempfile.TemporaryDirectory() as name:
        for what, shape, precision in measurements():
            title = f"{what}, {shape}, {precision}"
            if only not in title:
                continue
            folder, base = Path(name) / re.sub(r"\W+", "-", title), Path(name) / shape
            left = deadline - time.monotonic()
            if left <= 0:
                figures["not_reached"].append(title)
                continue
            if not base.is_dir():
                write_base(shape, base, dry)
            write_stage(what, precision, base, folder, dry)
            row = {"what": what, "shape": shape, "precision": precision}
            try:
                row |= run_alone(__file__, "--run", what, folder, timeout=max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                figures["not_reached"].append(title)
                continue
            except subprocess.CalledProcessError as error:  # killed: for its memory, say
                row["error"] = f"its process ended with exit code {error.returncode}"
            except (ValueError, IndexError):
                row["error"] = "its process printed no figures"
            if what in STAGES:
                phases = planned(folder)
                row["planned"] = max(phases[phase] for phase in PHASES.get(what, [p for p in phases if "PPO" in p]))
            figures["rows"].append(row)
            print(
                title, json.dumps({k: v for k, v in row.items() if k not in ("what", "shape", "precision")}), flush=True
            )
    return figures


def table_of(figures: dict[str, Any]) -> str:
    """Markdown; memory in GB."""
    lines = ["| | tokens a second | s | GB allocated | reserved | planned |", "| --- |" + " --- |" * 5]
    for row in figures["rows"]:
        title = f"{row['what']}, {row['shape']}, {row['precision']}"
        title += {True: ", CUDA graphs", False: ", no CUDA graphs", None: ""}[row.get("graphs")]
        own = [f"{row[key] / GB:.2f}" if key in row else "–" for key in ("allocated", "reserved", "planned")]
        if "error" in row:
            own = [row["error"].replace("|", "\\|"), "–", *own]
        else:
            own = [f"{row['tokens_a_second']:.0f}", f"{row['seconds']:.3f}", *own]
        lines.append(f"| {' | '.join([title, *own])} |")
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines += ["", f"On {figures['card'] or 'no GPU: ' + figures['machine']['cpu']}; {versions}."]
    if figures["not_reached"]:
        lines += ["", f"Not reached in the time: {'; '.join(figures['not_reached'])}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="in all, about (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with it in their name, such as `qwen`")
    parser.add_argument("--dry-run", action="store_true", help="all of it on tiny models, on the CPU")
    parser.add_argument("--table", metavar="FILE", help="print the table of figures that were written, and no more")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder = arguments.run
        print(json.dumps(measure(what, Path(folder))))
    elif arguments.table:
        print(table_of(json.loads(Path(arguments.table).read_text(encoding="utf-8"))))
    elif not (torch.cuda.is_available() or arguments.dry_run):
        parser.error("there is no GPU that torch can use; `--dry-run` shows that all of it runs")
    else:
        figures = measure_all(arguments.minutes, arguments.only, arguments.dry_run)
        write_json(figures, arguments.json)
        print(table_of(figures))


if __name__ == "__main__":
    main()
