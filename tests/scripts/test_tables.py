"""The table of docs/methods.md: what each figure is read from, and best-of-n against every choice of n."""

import json
from itertools import combinations
from statistics import fmean

from kochat_trl.desk.workflow import pipeline
from kochat_trl.settings.parse import resolve_arguments
from scripts import tables
from tests.tiny import ROOT

import pytest
import yaml


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_best_of_n_is_that_of_every_choice_of_n(n):
    scores, values = [0.3, -1.0, 2.5, 0.9, 1.1], [1.0, 0.0, 0.25, 1.0, 0.5]
    chosen = [max(choice, key=scores.__getitem__) for choice in combinations(range(5), n)]
    assert tables.mean_of_best(n, scores, values) == pytest.approx(fmean(values[i] for i in chosen))


def test_the_table_of_methods(tmp_path, monkeypatch):
    """Seeds 0, 1, 2 differ by 0.1 in all: half an interval is 4.303 · 0.1 / √3 = 0.248."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs").mkdir()

    def finish(steps, console):
        for step in (step for step in steps if step.command):
            step.output.mkdir(parents=True, exist_ok=True)
            words, seed = step.command, next(i for i in range(3) if f"seed{i}" in str(step.output)) / 10
            if step.stage == "evaluate":
                files = {"evaluation.json": {}}
            elif step.stage == "report":
                found = {"metrics": {"run": {"right": 0.5 + seed, "score": 1.5 + seed}}, "kl": {"run": {"mean": seed}}}
                files = {"report.html": {}, "report.json": {"runs": {"run": words[words.index("report") + 1]}} | found}
            else:
                file = words.index("--config") + 1
                resolved = resolve_arguments(step.stage, words[file], words[file + 1 :])
                (step.output / "resolved.yaml").write_text(yaml.safe_dump(resolved))
                files = {"metrics.json": {"train_runtime": 20 + seed}, "environment.json": {"peak_ram_bytes": 2**29}}
            for name, content in files.items():
                (step.output / name).write_text(json.dumps(content))

    def best_of_sft(plan):
        assert plan.outputs["sft"].parts[-2:] == (f"seed{plan.seed}", "sft")
        return {n: {"right": 0.1 * plan.seed, "score": n + 0.1 * plan.seed} for n in tables.BEST_OF}

    few = ("KTO", "RLOO", "PPO, value an adapter")
    monkeypatch.setattr(tables, "METHODS", {row: tables.METHODS[row] for row in few})
    monkeypatch.setattr(pipeline, "run_plan", finish)
    monkeypatch.setattr(tables, "best_of_sft", best_of_sft)
    monkeypatch.setattr(tables, "importing", lambda stage: 2**28)
    ((name, table),) = tables.methods()
    assert name == "methods"
    heading, _, *lines = table.splitlines()
    assert heading == "|  | right | score | KL | seconds | MiB |"
    cost = "20.1 ± 0.2 | 256.0 ± 0.0 |"
    assert lines[:4] == [
        f"| SFT | 0.100 ± 0.248 | 1.10 ± 0.25 | 0 | {cost}",
        f"| reward model | – | – | – | {cost}",
        "| best of 4 | 0.100 ± 0.248 | 4.10 ± 0.25 | ≤ 0.64 | – | – |",
        "| best of 16 | 0.100 ± 0.248 | 16.1 ± 0.2 | ≤ 1.84 | – | – |",
    ]
    assert lines[4:] == [f"| {row} | 0.600 ± 0.248 | 1.60 ± 0.25 | 0.100 ± 0.248 | {cost}" for row in few]
    assert (tmp_path / "docs/methods.png").stat().st_size > 10_000
