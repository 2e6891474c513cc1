"""The benchmark of a GPU: its table, and all of it on tiny models."""

import importlib
import json

from tests.tiny import ROOT

import pytest

ROW = {"what": "ppo", "shape": "kogpt2", "precision": "int8"}
GB = 2**30
FIGURES = {
    "card": "A card",
    "versions": {"torch": "2.13.0"},
    "rows": [
        ROW | {"tokens_a_second": 512.4, "seconds": 0.9991, "allocated": GB, "reserved": 2 * GB, "planned": 3 * GB},
        ROW | {"precision": "nf4", "error": "OutOfMemoryError: a | b", "planned": GB // 2},
        ROW | {"what": "sampling, compiled", "tokens_a_second": 9.0, "seconds": 1.0, "graphs": False},
    ],
    "not_reached": ["sft, qwen2.5-0.5b, nf4"],
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as where it runs as a script
    return importlib.import_module("gpu")


def test_the_table_has_errors_in_their_row_and_what_was_not_reached(gpu):
    _, _, *lines = gpu.table_of(FIGURES).splitlines()
    assert lines == [
        "| ppo, kogpt2, int8 | 512 | 0.999 | 1.00 | 2.00 | 3.00 |",
        "| ppo, kogpt2, nf4 | OutOfMemoryError: a \\| b | – | – | – | 0.50 |",
        "| sampling, compiled, kogpt2, int8, no CUDA graphs | 9 | 1.000 | – | – | – |",
        "",
        "On A card; torch 2.13.0.",
        "",
        "Not reached in the time: sft, qwen2.5-0.5b, nf4.",
    ]


def test_each_is_measured_once_and_a_stage_comes_before_its_comparisons(gpu):
    every = list(gpu.measurements())
    assert len(every) == len(set(every)) == 2 * (4 * 4 + 3) + 2
    assert [what for what, _, _ in every[:9]] == [*gpu.STAGES, *gpu.SAMPLING, "trl ppo", "trl rloo"]


def test_what_fails_in_its_process_is_an_error(gpu, tmp_path):
    assert gpu.measure("sft", tmp_path)["error"].startswith("UserError: ")


@pytest.mark.parametrize(
    ("code", "minutes", "reached"),
    [("import os; os.kill(os.getpid(), 9)", 5, True), ("import time; time.sleep(600)", 0.05, False), ("", 0, False)],
)
def test_a_process_that_is_killed_is_a_row_and_one_out_of_time_is_named(
    gpu, monkeypatch, tmp_path, code, minutes, reached
):
    script = tmp_path / "killed.py"
    script.write_text(code)
    monkeypatch.setattr(gpu, "__file__", str(script))
    figures = gpu.measure_all(minutes, "sft, kogpt2, bf16", dry=True)
    if reached:
        (row,) = figures["rows"]
        assert row["error"] == "its process ended with exit code -9"
        assert row["planned"] > 0
        assert not figures["not_reached"]
    else:
        assert (figures["rows"], figures["not_reached"]) == ([], ["sft, kogpt2, bf16"])


@pytest.mark.slow
def test_a_dry_run_measures_without_a_network(run_command, tmp_path):
    """The stages of one shape in one precision, TRL's trainers, and sampling."""
    file = tmp_path / "gpu.json"
    done = run_command(
        "benchmarks/gpu.py", "--dry-run", "--only", "kogpt2, bf16", "--minutes", "20", "--json", file, timeout=1200
    )
    assert done.code == 0, done.text
    assert not done.network
    figures = json.loads(file.read_text())
    assert not figures["not_reached"]
    rows = {row["what"]: row for row in figures["rows"]}
    stages = {"sft", "reward", "ppo", "rloo"}
    others = {"sampling", "sampling, generate", "sampling, compiled", "trl ppo", "trl rloo"}
    assert rows.keys() == stages | others
    for what, row in rows.items():
        assert "error" not in row, row
        assert row["tokens_a_second"] > 0
        assert (row.get("planned", 0) > 0) == (what in stages)
