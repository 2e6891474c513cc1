"""Write the tables of docs/data.md, hardware.md, bases.md, experiments.md, methods.md and labels.md.

    python scripts/tables.py data                         # from the tables of kochat_trl/data/shapes.py
    python scripts/tables.py hardware                     # from shapes alone, and benchmarks/memory.py; half an hour
    python scripts/tables.py gpu                          # gpu.json, of benchmarks/gpu.py; into docs/hardware.md
    python scripts/tables.py bases                        # benchmarks/architectures.py; two minutes
    make demo && python scripts/tables.py experiments     # runs every experiment over three seeds, if not done; an hour
    make demo && python scripts/tables.py methods         # likewise every method; 45 minutes
    make demo && python scripts/tables.py labels          # benchmarks/labels.py, if not done; 45 minutes

A table stands between `<!-- NAME -->` and `<!-- end -->` in its document, and is written there.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

from kochat_trl.errors import UserError, run

from rich.console import Console
from transformers import PretrainedConfig

DOCS = Path("docs")
ELSEWHERE = {"gpu": "hardware"}  # a table → the document that it shares with another
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
# Row of docs/methods.md → its config, and what takes PPO's place.
METHODS = {
    "DPO": (SET, "dpo"),
    "KTO": (SET, "kto"),
    "RLOO": ("configs/experiments/rloo.yaml", "ppo"),
    "GRPO": ("configs/experiments/grpo.yaml", "ppo"),
    "PPO, value an adapter": (SET, "ppo"),
    "PPO, value shared": ("configs/experiments/value_shared.yaml", "ppo"),
    "PPO with a rule": ("configs/experiments/rule.yaml", "ppo"),
}
BEST_OF = (1, 2, 4, 8, 16)
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
    yield "measured", printed_by("benchmarks/memory.py")


def gpu() -> Iterator[tuple[str, str]]:
    """What `python benchmarks/gpu.py --json gpu.json` measured."""
    yield "gpu", printed_by("benchmarks/gpu.py", "--table", "gpu.json")


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
    yield "architectures", printed_by("benchmarks/architectures.py")


def labels() -> Iterator[tuple[str, str]]:
    """The reward model by the number of labels; draws docs/labels.png too."""
    yield "labels", printed_by("benchmarks/labels.py", "--plot", str(DOCS / "labels.png"))


def printed_by(*words: str) -> str:
    """What `python WORDS` prints."""
    return subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def experiments() -> Iterator[tuple[str, str]]:
    """The comparison of the set with each group of experiments, which are run first."""
    from kochat_trl.desk.workflow.pipeline import as_markdown, compare_runs, make_plans, run_plan

    console = Console()
    for table, names in EXPERIMENTS.items():
        plans = make_plans([SET, *(f"configs/experiments/{name}.yaml" for name in names)], SEEDS)
        run_plan([step for plan in plans for step in plan.steps], console)
        yield table, as_markdown(compare_runs(plans))


def methods() -> Iterator[tuple[str, str]]:
    """Every method over the seeds, which are run first; draws docs/methods.png too."""
    from kochat_trl.desk.answers.best_of import kl_of_best
    from kochat_trl.desk.workflow.pipeline import as_markdown, cell, make_plans, run_plan

    console, plans = Console(), {}
    for row, (config, method) in METHODS.items():
        plans[row] = make_plans([config], SEEDS, methods=[method])
        run_plan([step for plan in plans[row] for step in plan.steps], console)
    base = plans["PPO, value an adapter"]
    best = [best_of_sft(plan) for plan in base]
    costs = {stage: [cost_of(plan, stage) for plan in base] for stage in ("sft", "reward")}
    rows = {"SFT": [found[1] | cost for found, cost in zip(best, costs["sft"], strict=True)]}
    rows |= {"reward model": costs["reward"]}
    rows |= {f"best of {n}": [found[n] for found in best] for n in (4, 16)}
    rows |= {row: [figures_of_method(plan) for plan in its] for row, its in plans.items()}
    bounds = {"SFT": "0"} | {f"best of {n}": f"≤ {kl_of_best(n):.2f}" for n in (4, 16)}
    columns = ["right", "score", "KL", "seconds", "MiB"]
    lines = [["", *columns]]
    for row, seeds in rows.items():
        cells = {key: cell([found[key] for found in seeds if key in found]) for key in columns}
        lines.append([row, *(cells | ({"KL": bounds[row]} if row in bounds else {})).values()])
    plot_methods({row: rows[row] for row in METHODS}, {kl_of_best(n): [found[n] for found in best] for n in BEST_OF})
    yield "methods", as_markdown(lines)


def figures_of_method(plan: Any) -> dict[str, float]:
    """Of one seed, as its report has them: the share of right answers, the reward model's mean score, KL in nats."""
    report = json.loads((plan.outputs["report"] / "report.json").read_text(encoding="utf-8"))
    (run,) = report["runs"]
    metrics = report["metrics"][run]
    found = {"right": metrics["right"], "score": metrics["score"], "KL": report["kl"][run]["mean"]}
    return found | cost_of(plan, plan.method)


def cost_of(plan: Any, stage: str) -> dict[str, float]:
    """Seconds of a stage's training, and the peak of its process above what importing its recipe takes."""
    texts = [(plan.outputs[stage] / name).read_text(encoding="utf-8") for name in ("metrics.json", "environment.json")]
    metrics, environment = map(json.loads, texts)
    return {"seconds": metrics["train_runtime"], "MiB": (environment["peak_ram_bytes"] - importing(stage)) / 2**20}


@cache
def importing(stage: str) -> int:
    """Bytes that a recipe takes before it does anything."""
    code = f"import recipes.{stage}; from kochat_trl.runs.outputs import peak_ram; print(peak_ram())"
    return int(printed_by("-c", code))


def best_of_sft(plan: Any) -> dict[int, dict[str, float]]:
    """The best of n answers of SFT to the report's questions, by the reward model: how many are right, and its score.

    Each question is answered as often as the largest n, once; of fewer, every choice of n of those answers counts.
    """
    from kochat_trl.data.probes import PROBES
    from kochat_trl.desk.answers.best_of import sample_answers
    from kochat_trl.desk.answers.generate import decoding
    from kochat_trl.desk.workflow.report import Run, read_questions
    from kochat_trl.models.loading import load_policy
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.reward.score import load_scorer, score_ids
    from kochat_trl.rows.encode import encode_prompts
    from kochat_trl.settings.keys import ModelArguments

    run = Run.of(plan.outputs["ppo"])
    prompts, _, _, judge = read_questions([run], None)
    prompts = [prompt for prompt in prompts if prompt.prompt not in dict(PROBES)]
    tokenizer = load_tokenizer(str(run.sft))
    model = load_policy(str(run.sft), ModelArguments(dtype="float32"), tokenizer)
    settings = decoding("sample", max_new_tokens=run.settings["response_length"])
    answers = sample_answers(model, tokenizer, prompts, settings, max(BEST_OF), seed=plan.seed)
    ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    texts = [[*own, *answer.ids] for own, its in zip(ids, answers, strict=True) for answer in its]
    scores = iter(score_ids(load_scorer(str(run.reward), "float32", tokenizer), tokenizer, texts))
    found: dict[int, dict[str, list[float]]] = {n: {"right": [], "score": []} for n in BEST_OF}
    for prompt, its in zip(prompts, answers, strict=True):
        own = [next(scores) for _ in its]
        right = [judge.verdict(prompt.prompt, answer.text, answer.ended)["correct"] for answer in its]
        for n, lists in found.items():
            lists["right"].append(mean_of_best(n, own, right))
            lists["score"].append(mean_of_best(n, own, own))
    return {n: {key: fmean(values) for key, values in lists.items()} for n, lists in found.items()}


def mean_of_best(n: int, scores: Sequence[float], values: Sequence[float]) -> float:
    """The mean value of the answer that scores highest, over all choices of n of the answers."""
    in_order = sorted(range(len(scores)), key=scores.__getitem__)
    return sum(comb(below, n - 1) * values[i] for below, i in enumerate(in_order)) / comb(len(scores), n)


def plot_methods(rows: dict[str, list[dict[str, float]]], best: dict[float, list[dict[str, float]]]) -> None:
    """Right answers against KL: a point a method with its 95 % intervals over the seeds, and a curve for best of n."""
    import matplotlib

    matplotlib.use("Agg")
    from kochat_trl.desk.statistics import half_interval

    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    shares = [[found["right"] for found in seeds] for seeds in best.values()]
    middle, half = [fmean(share) for share in shares], [half_interval(share) for share in shares]
    axis.errorbar([*best], middle, half, fmt="o-", color="0.5", label="best of n from SFT (KL at most)", capsize=2)
    for n, kl, share in zip(BEST_OF, best, middle, strict=True):
        axis.annotate(f"n = {n}" if n > 1 else "SFT", (kl, share), (4, -12), textcoords="offset points", fontsize=8)
    for row, seeds in rows.items():
        (x, xerr), (y, yerr) = (
            (fmean(values), half_interval(values))
            for values in zip(*((s["KL"], s["right"]) for s in seeds), strict=True)
        )
        axis.errorbar(x, y, yerr, xerr, fmt="o", label=row, capsize=2)
    axis.set(xlabel="KL from SFT, nats a response", ylabel="right answers, held-out questions", xlim=(-0.15, None))
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "methods.png", dpi=110)


def fill(path: Path, name: str, table: str) -> None:
    """Put the table in its place in a document."""
    text = path.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.S)
    if not place.search(text):
        raise UserError(f"{path}: no lines <!-- {name} --> and <!-- end --> to put the table between")
    path.write_text(place.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {its.__name__: its for its in (data, hardware, gpu, bases, experiments, methods, labels)}
    parser.add_argument("document", choices=tables)
    document = parser.parse_args().document
    for name, table in tables[document]():
        fill(DOCS / f"{ELSEWHERE.get(document, document)}.md", name, table)


if __name__ == "__main__":
    run(main)
