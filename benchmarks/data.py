"""Time and memory of reading, validating and converting data: `python benchmarks/data.py --json data.json`

Files are generated in KoChatGPT's shapes and sizes: 12,000 SFT records with answers of about 200 characters, 10,220
rankings of three (30,660 pairs), 12,000 prompts, each one indented JSON array, and the same records as Parquet. At 1×,
10× and 100× that size, a fresh process for each of the two turns every record into the rows of text that the recipes
tokenize, one after the other, and keeps none.

- `seconds`: wall time, without imports, a format's own start, and making the files.
- `peak_bytes`: how far the process's peak resident memory rises above its level after imports (Linux only).

Bound at 1×, for each of the two: 3 s and 300 MB; with a run over it the exit status is 1. The files of
100× take 3 GB of temporary space.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kochat_trl.data.parse import parse
from kochat_trl.data.readers import read_records
from kochat_trl.data.shapes import Kind
from kochat_trl.desk.curation.convert import text_rows
from kochat_trl.settings.keys import DataArguments

import pyarrow as pa
import pyarrow.parquet as pq
from common import machine, memory, run_alone, write_json

SIZES = (1, 10, 100)
FORMS = ("JSON", "Parquet")
RECORDS: dict[Kind, int] = {"sft": 12_000, "preference": 10_220, "prompt": 12_000}
BOUND_SECONDS, BOUND_BYTES = 3.0, 300_000_000
KNOWN_BYTES = 100_000_000  # taken to test the gauge
WORDS = "저는 인공지능 모델이기 때문에 정확한 답변을 드리기 어렵지만 대한민국의 수도인 서울은 매우 큰 도시입니다."

# --- Files --------------------------------------------------------------------------------------


def some_text(rng: random.Random, length: int) -> str:
    """Korean words, about `length` characters."""
    return " ".join(rng.choices(WORDS.split(), k=max(length // 4, 1)))


def generated(kind: Kind, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The records of one file at 1×, under KoChatGPT's field names."""
    for _ in range(RECORDS[kind]):
        prompt = {"prompt": some_text(rng, rng.randrange(10, 40))}
        if kind == "sft":
            yield prompt | {"completion": some_text(rng, rng.randrange(100, 300)), "tokens": rng.randrange(300)}
        elif kind == "preference":
            completions = {f"completion_{i}": f"{i} {some_text(rng, rng.randrange(20, 200))}" for i in range(3)}
            yield prompt | completions | {"ranking": rng.sample(range(3), 3)}
        else:
            yield prompt


def write_files(folder: Path, size: int) -> None:
    """Write a JSON and a Parquet file of each kind into folders of these names, the records of 1× `size` times over."""
    rng = random.Random(0)
    for form in FORMS:
        (folder / form).mkdir()
    for kind in RECORDS:
        records = list(generated(kind, rng))
        texts = (json.dumps(record, ensure_ascii=False, indent=4) for record in records)
        body = ",\n".join(textwrap.indent(text, "    ") for text in texts)
        with (folder / "JSON" / kind).open("w", encoding="utf-8") as file:
            file.write("[\n")
            for i in range(size):
                file.write(f"{body},\n" if i < size - 1 else f"{body}\n]\n")
        table = pa.Table.from_pylist(records)
        with pq.ParquetWriter(folder / "Parquet" / kind, table.schema) as writer:
            for _ in range(size):
                writer.write_table(table)


# --- In the measured process --------------------------------------------------------------------


def convert_files(folder: Path) -> dict[str, int]:
    """Read, validate and convert each file; return how many records and rows there were."""
    counts = {"records": 0, "rows": 0}
    options = DataArguments(pairs="all")
    for kind in RECORDS:
        for raw in read_records(folder / kind):
            for record in parse(raw, kind):
                for _row in text_rows(record, raw.source.index, options):
                    counts["rows"] += 1
            counts["records"] += 1
    return counts


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work`: its result, wall time, and the peak of resident memory above the level before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on, without that of the imports
    before, begun = memory("VmRSS"), time.perf_counter()
    result = work()
    return {"result": result, "seconds": time.perf_counter() - begun, "peak_bytes": memory("VmHWM") - before}


# --- In the process that was started ------------------------------------------------------------


def measure(what: str) -> dict[str, Any]:
    """`measured` in a new interpreter: `what` is a folder of files, or 'known' for a known amount of memory."""
    return run_alone(__file__, "--measure", what)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of reading, validating and converting data.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="times the size of KoChatGPT's data")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work = (lambda: len(b"x" * KNOWN_BYTES)) if options.measure == "known" else None
        if not work:
            next(read_records(Path(options.measure) / "prompt"))  # what a format needs is loaded now
        print(json.dumps(measured(work or (lambda: convert_files(Path(options.measure))))))
        return

    known = measure("known")["peak_bytes"]
    if not 0.99 < known / KNOWN_BYTES < 1.05:
        raise SystemExit(f"the memory gauge is off: it shows {known:,} bytes where {KNOWN_BYTES:,} were taken")
    figures: dict[str, Any] = {
        "machine": machine() | {"load": os.getloadavg()[0]},
        "gauge": {"taken": KNOWN_BYTES, "shown": known},
    }
    print(
        f"{'size':>5} {'format':>8} {'records':>10} {'rows':>10} {'file MB':>8} {'seconds':>8} {'records/s':>10} "
        f"{'peak MB':>8}"
    )
    met = True
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), size)
            for form in FORMS:
                its = Path(folder) / form
                file_bytes = sum(path.stat().st_size for path in its.iterdir())
                run = measure(str(its))
                counts = run["result"] | {"file_bytes": file_bytes} | {k: run[k] for k in ("seconds", "peak_bytes")}
                for name, figure in counts.items():
                    figures.setdefault(form, {}).setdefault(name, {})[str(size)] = figure
                speed = counts["records"] / counts["seconds"]
                print(
                    f"{f'{size}×':>5} {form:>8} {counts['records']:>10,} {counts['rows']:>10,} "
                    f"{file_bytes / 1e6:>8,.1f} {counts['seconds']:>8.2f} {speed:>10,.0f} "
                    f"{counts['peak_bytes'] / 1e6:>8.1f}"
                )
                met &= size > 1 or (counts["seconds"] < BOUND_SECONDS and counts["peak_bytes"] < BOUND_BYTES)
    write_json(figures, options.json)
    if 1 in options.sizes:
        print(f"bound at 1×, {BOUND_SECONDS:.0f} s and {BOUND_BYTES / 1e6:.0f} MB: {'met' if met else 'NOT met'}")
        sys.exit(not met)


if __name__ == "__main__":
    main()
