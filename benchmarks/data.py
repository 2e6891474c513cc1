"""Time and memory of reading, validating and converting data: `python benchmarks/data.py --json data.json`

Files are generated in KoChatGPT's shapes and sizes: 12,000 SFT records with answers of about 200 characters, 10,220
rankings of three (30,660 pairs), 12,000 prompts, each one indented JSON array. At 1×, 10× and 100× that size, a fresh
process turns every record into the rows of text that the recipes tokenize, one after the other, and keeps none.

- `seconds`: wall time, without imports and without making the files.
- `peak_bytes`: how far the process's peak resident memory rises above its level after imports (Linux only).

Bound at 1×: 3 s and 300 MB; with a run over it the exit status is 1. The files of 100× take 2 GB of temporary space.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kochat_trl.data.readers import read_records
from kochat_trl.data.records import Kind, parse
from kochat_trl.desk.curation.convert import text_rows
from kochat_trl.settings.keys import DataArguments

from common import memory, run_alone, write_json

SIZES = (1, 10, 100)
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


def write_files(folder: Path, size: int) -> int:
    """Write one file of each kind, the records of 1× `size` times over; return their bytes."""
    rng = random.Random(0)
    for kind in RECORDS:
        records = (json.dumps(record, ensure_ascii=False, indent=4) for record in generated(kind, rng))
        body = ",\n".join(textwrap.indent(record, "    ") for record in records)
        with (folder / kind).open("w", encoding="utf-8") as file:
            file.write("[\n")
            for i in range(size):
                file.write(f"{body},\n" if i < size - 1 else f"{body}\n]\n")
    return sum(path.stat().st_size for path in folder.iterdir())


# --- In the measured process --------------------------------------------------------------------


def convert_files(folder: Path) -> dict[str, int]:
    """Read, validate and convert each file; return how many records and rows there were."""
    counts = {"records": 0, "rows": 0}
    options = DataArguments(pairs="all")
    for kind in RECORDS:
        for raw in read_records(folder / kind):
            for _row in text_rows(parse(raw, kind), raw.source.index, options):
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


def machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of other work, if it is over 0
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of reading, validating and converting data.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="times the size of KoChatGPT's data")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work = (lambda: len(b"x" * KNOWN_BYTES)) if options.measure == "known" else None
        print(json.dumps(measured(work or (lambda: convert_files(Path(options.measure))))))
        return

    known = measure("known")["peak_bytes"]
    if not 0.99 < known / KNOWN_BYTES < 1.05:
        raise SystemExit(f"the memory gauge is off: it shows {known:,} bytes where {KNOWN_BYTES:,} were taken")
    figures: dict[str, Any] = {"machine": machine(), "gauge": {"taken": KNOWN_BYTES, "shown": known}}
    print(f"{'size':>5} {'records':>10} {'rows':>10} {'file MB':>8} {'seconds':>8} {'records/s':>10} {'peak MB':>8}")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file_bytes = write_files(Path(folder), size)
            run = measure(folder)
        counts = run["result"] | {"file_bytes": file_bytes, "seconds": run["seconds"], "peak_bytes": run["peak_bytes"]}
        for name, figure in counts.items():
            figures.setdefault(name, {})[str(size)] = figure
        speed = counts["records"] / counts["seconds"]
        print(
            f"{f'{size}×':>5} {counts['records']:>10,} {counts['rows']:>10,} {file_bytes / 1e6:>8,.1f} "
            f"{counts['seconds']:>8.2f} {speed:>10,.0f} {counts['peak_bytes'] / 1e6:>8.1f}"
        )
    write_json(figures, options.json)
    if "1" in figures["seconds"]:
        met = figures["seconds"]["1"] < BOUND_SECONDS and figures["peak_bytes"]["1"] < BOUND_BYTES
        print(f"bound at 1×, {BOUND_SECONDS:.0f} s and {BOUND_BYTES / 1e6:.0f} MB: {'met' if met else 'NOT met'}")
        sys.exit(not met)


if __name__ == "__main__":
    main()
