"""Write the tables of docs/data.md, docs/hardware.md, docs/bases.md and docs/experiments.md.

    python scripts/tables.py data                         # from the tables of kochat_trl/data/shapes.py
    python scripts/tables.py hardware                     # from shapes alone, and benchmarks/memory.py; half an hour
    python scripts/tables.py bases                        # benchmarks/architectures.py; two minutes
    make demo && python scripts/tables.py experiments     # runs every experiment over three seeds, if not done; an hour

A table stands between `<!-- NAME -->` and `<!-- end -->` in its document, and is written there.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kochat_trl.errors import UserError, run

from rich.console import Console
from transformers import PretrainedConfig

DOCS = Path("docs")
SET = "configs/tiny"
SEEDS = (0, 1, 2)
# Table → the experiments in it, beside the set itself.
EXPERIMENTS = {
    "pairs": ["best_vs_rest", "rank_of"],
    "loss": ["listwise"],
    "rank": ["lora_r4"],
    "precision": ["float32", "nf4"],
    "kl": ["kl_0", "kl_adaptive"],
    "estimator": ["kl_k3"],
    "value": ["value_shared"],
}
PRECISIONS = {
    "float32": ["--load_in_8bit", "false", "--bf16", "false"],
    "bf16": ["--load_in_8bit", "false"],
    "int8": [],
    "nf4": ["--load_in_8bit", "false", "--load_in_4bit", "true"],
}


def shapes() -> dict[str, PretrainedConfig]:
    """Base models, and what their config.json says of shapes."""
    from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

    neox = {"vocab_size": 30080, "max_position_embeddings": 2048, "num_attention_heads": 16, "rotary_pct": 0.5}
    qwen = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    qwen3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    gemma = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    llama = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32}
    trinity = {"n_embd": 1920, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 51200}
    return {
        "skt/kogpt2-base-v2": GPT2Config(vocab_size=51200),
        "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
            **qwen, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
        ),
        "Qwen/Qwen3-0.6B": Qwen3Config(
            **qwen3, num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True
        ),
        "google/gemma-3-1b-it": Gemma3TextConfig(**gemma, num_key_value_heads=1, head_dim=256, vocab_size=262144),
        "skt/ko-gpt-trinity-1.2B-v0.5": GPT2Config(**trinity),
        "42dot/42dot_LLM-PLM-1.3B": LlamaConfig(**llama, vocab_size=50304),
        "EleutherAI/polyglot-ko-1.3b": GPTNeoXConfig(
            **neox, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24
        ),
        "EleutherAI/polyglot-ko-5.8b": GPTNeoXConfig(
            **neox, hidden_size=4096, intermediate_size=16384, num_hidden_layers=28
        ),
    }


def hardware() -> Iterator[tuple[str, str]]:
    """For each base and precision GB of each stage, as configs/kogpt2 has it, and the cards that it fits; and the
    planner against real steps."""
    from kochat_trl.desk.workflow.memory import CARDS, GB, most_rows, plan_memory

    lines = ["| | | SFT | reward model | PPO | as configured on | one row on |", "| --- |" + " --- |" * 6]
    for base, shape in shapes().items():
        for precision, flags in PRECISIONS.items():
            planned = plan_memory("configs/kogpt2", flags, shape)
            one, many = (plan_memory("configs/kogpt2", flags, shape, rows) for rows in (1, 32))
            sft, reward, *ppo = (footprint.peak / GB for footprint in planned)
            phases = list(zip(one, planned, many, strict=True))
            rows = {card: [most_rows(*phase, card) for phase in phases] for card in CARDS}
            whole = (card for card, n in rows.items() if all(a >= f.rows for a, f in zip(n, planned, strict=True)))
            single = (card for card, n in rows.items() if min(n) >= 1)
            cards = [f"{card} GB" if card else "–" for card in (next(whole, None), next(single, None))]
            cells = [base, precision, f"{sft:.1f}", f"{reward:.1f}", f"{max(ppo):.1f}", *cards]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    yield "cards", "\n".join(lines)
    done = subprocess.run([sys.executable, "benchmarks/memory.py"], check=True, stdout=subprocess.PIPE, text=True)
    yield "measured", done.stdout.strip()


def data() -> Iterator[tuple[str, str]]:
    """The names of fields, and the shapes that they make."""
    from kochat_trl.data.shapes import NAMES, SHAPES

    rows = ["| what it is | names |", "| --- | --- |"]
    rows += [f"| `{role}` | {', '.join(names.split())} |" for role, names in NAMES.items()]
    yield "names", "\n".join(rows)
    rows = ["| for | needs | may have | who has it | example |", "| --- |" + " --- |" * 4]
    for shape in SHAPES:
        example = json.dumps(shape.example, ensure_ascii=False)
        needs, may = (" + ".join(roles.split()) for roles in (shape.needs, shape.may))
        rows.append(f"| {shape.kind} | {needs} | {may.replace(' + ', ', ')} | {shape.owners} | `{example}` |")
    yield "shapes", "\n".join(rows)


def bases() -> Iterator[tuple[str, str]]:
    """The architectures that run."""
    done = subprocess.run(
        [sys.executable, "benchmarks/architectures.py"], check=True, stdout=subprocess.PIPE, text=True
    )
    yield "architectures", done.stdout.strip()


def experiments() -> Iterator[tuple[str, str]]:
    """The comparison of the set with each group of experiments, which are run first."""
    from kochat_trl.desk.workflow.pipeline import as_markdown, compare_runs, make_plans, run_plan

    console = Console()
    for table, names in EXPERIMENTS.items():
        plans = make_plans([SET, *(f"configs/experiments/{name}.yaml" for name in names)], SEEDS)
        run_plan([step for plan in plans for step in plan.steps], console)
        yield table, as_markdown(compare_runs(plans))


def fill(path: Path, name: str, table: str) -> None:
    """Put the table in its place in a document."""
    text = path.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.S)
    if not place.search(text):
        raise UserError(f"{path}: no lines <!-- {name} --> and <!-- end --> to put the table between")
    path.write_text(place.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {"data": data, "hardware": hardware, "bases": bases, "experiments": experiments}
    parser.add_argument("document", choices=tables)
    document = parser.parse_args().document
    for name, table in tables[document]():
        fill(DOCS / f"{document}.md", name, table)


if __name__ == "__main__":
    run(main)
