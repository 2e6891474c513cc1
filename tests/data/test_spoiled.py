"""Whatever happened to a file, it ends in records or in an error that says where; an independent reading tells which.

SPOILED_FILES=100000 pytest tests/data/test_spoiled.py tries as many, other ones in each run.
"""

import dataclasses
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from kochat_trl.data import readers
from kochat_trl.data.layout import Layout, RawRecord
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.readers import file_format, read_records
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking, RecordError, Unreadable
from kochat_trl.desk.curation.audit import check_files
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from tests.data.foreign import unaccounted
from tests.data.spoiled import (
    SPOILED,
    TEXTS,
    Input,
    bytes_inside,
    expected_fields,
    is_as_expected,
    is_records,
    json_value,
    spoil_binary,
)

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

EXAMPLES = int(os.environ.get("SPOILED_FILES", 1700))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SPOILED_FILES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS = 5.0  # for one input
ONE_SCREEN = 1000  # characters of one message
MANY = 1000  # records; a file that has more is only read: a flipped bit in gzip can make 100,000 empty lines


KINDS = ("sft", "preference", "prompt", "kto")
TYPES = {"sft": Dialogue, "preference": Ranking, "prompt": Prompt, "kto": Labelled}


class Wrong(Exception):
    """Something that must not happen."""


class Hang(BaseException):
    """An input took too long. No `except Exception` stops it."""


def check(holds: Any, says: str) -> None:
    if not holds:
        raise Wrong(says)


@dataclass
class File:
    """An input on disk, and what became of it: its records, and the error in which they end, if they do."""

    path: Path
    content: Input
    raws: list[RawRecord] = field(default_factory=list)
    error: UserError | None = None

    @cached_property
    def inside(self) -> bytes | None:
        return bytes_inside(self.content.data)

    @cached_property
    def lines(self) -> float:
        """How many lines there are; no limit is known of a broken gzip file."""
        return float("inf") if self.inside is None else self.inside.count(b"\n") + 1


def check_located(error: UserError, file: File) -> None:
    """The message names the file, a line that it has, and fits on a screen."""
    message = str(error)
    check(message.startswith(str(file.path)), f"the message doesn't begin with the file: {message!r}")
    rest = message.removeprefix(str(file.path))
    match = re.match(r", line (\d+)( \(record \d+\))?: ", rest)
    check(match or re.match(": (is empty|is UTF-16)", rest), f"the message names no line: {message!r}")
    check(not match or 1 <= int(match[1]) <= file.lines, f"no such line: {message!r}")
    check(len(rest) < ONE_SCREEN, f"a message of {len(rest)} characters: {rest[:200]!r}")
    check(rest.replace("\n", "").isprintable(), f"a message that can't be printed: {message!r}")


def read(file: File) -> None:
    """Reading gives all records that are there, each where it is, or an error that says where."""
    try:
        for raw in read_records(file.path):
            file.raws.append(raw)
    except UserError as error:
        file.error = error
        check_located(error, file)
    lines = [raw.source.line or 0 for raw in file.raws]
    check([raw.source.index for raw in file.raws] == list(range(len(lines))), "indices are not 0, 1, 2, ...")
    check(lines == sorted(lines), f"lines go back: {lines}")

    try:
        form = file_format(file.path)
        shape, delimiter = form.shape, form.delimiter
    except UserError as error:
        check(str(error) == str(file.error), f"the format gives {error}, reading {file.error}")
        shape = None
    try:
        content = (file.inside or b"").decode().lstrip("\ufeff")
    except UnicodeDecodeError:
        content = ""
    if not content.strip():
        check(file.error, "an empty file, or one that can't be decoded, was read")
        return
    if shape is None:
        check(not is_records(json_value(content)) or "\r" in content, "a JSON array was not told")
        return
    check(shape == "array" or not is_records(json_value(content)), f"a JSON array was taken for {shape}")
    check(file.content.shape in (None, shape), f"{file.content.shape} was taken for {shape}")
    check(file.content.count in (None, len(file.raws)), f"{file.content.count} records, {len(file.raws)} were read")
    try:
        expected = expected_fields(shape, content, delimiter)
    except LookupError:
        return
    if expected is None:
        check(file.error, f"broken {shape} was read without an error")
        return
    check(not file.error, f"whole {shape} gave {file.error}")
    check(len(file.raws) == len(expected), f"{len(file.raws)} records of {len(expected)}")
    for raw, fields in zip(file.raws, expected, strict=True):
        check(
            is_as_expected(raw.fields, fields), f"record {raw.source.index} is {raw.fields!r:.300}, not {fields!r:.300}"
        )


def parse_all(file: File) -> None:
    """Each record can be used, and all its texts are accounted for, or an error says where it is and why not; for every
    kind, under both orders."""
    layouts = [Layout(ReadingOptions(ranking_order=order, labels="true_only")) for order in ("best_first", "rank_of")]
    for old, kind, layout in product(file.raws, KINDS, layouts):
        raw = dataclasses.replace(old, layout=layout)
        own = kind_of(raw)
        check(own in (*KINDS, None), "kind_of")
        try:
            records = parse(raw, kind)
        except RecordError as error:
            check_located(error, file)
            check(error.source == raw.source, f"{error.source} instead of {raw.source}")
            continue
        for record in records:
            check(isinstance(record, TYPES[kind] | Labelled), f"{kind} gave {record}")
            if isinstance(record, Ranking):
                pairs = {(pair.better, pair.worse) for pair in record.pairs()}
                check(pairs and max(map(max, pairs)) < len(record.completions), f"{record}: {pairs}")
        if kind == own and records:
            check(not (missing := unaccounted(raw, records)), f"{raw.fields!r:.300} was read without {missing!r:.200}")


def write_back(file: File) -> None:
    """Records that were read can be written in the same shape, and are read back as they were."""
    fields = [raw.fields for raw in file.raws if isinstance(raw.fields, dict)]
    if file.error or not fields:
        return
    again = file.path.with_name("written")
    again.unlink(missing_ok=True)
    form = file_format(file.path)
    try:
        write_records(again, form, fields)
    except UserError as error:
        check(not again.exists(), f"a file was left behind by {error}")
        return
    back = [raw.fields for raw in read_records(again)]
    check(back == fields, f"{form.shape} written and read again is {back!r:.300}, not {fields!r:.300}")


def audit(file: File) -> None:
    """`kochat data check` counts the same records, each as usable or as an error, and says what can't be read."""
    report = check_files([str(file.path)]).files[0]
    if "nested too deeply" in (report.unreadable or ""):
        return  # how deep the parser goes hangs on who calls it
    check(report.records == len(file.raws), f"the audit counts {report.records} records, there are {len(file.raws)}")
    check(report.usable + report.errors == report.records, f"{report.usable} + {report.errors} of {report.records}")
    check(report.unreadable == (str(file.error) if file.error else None), f"the audit says {report.unreadable!r}")


def clean(file: File) -> None:
    """`kochat data clean` accounts for each record, leaves no half file behind, and nothing that it would do again."""
    names = [file.path.with_name(name) for name in ("cleaned", "report", "again", "second report")]
    for name in names:
        name.unlink(missing_ok=True)
    cleaned, report, again, second_report = names
    try:
        summary = clean_file(file.path, cleaned, report=report)
    except UserError as error:
        check(str(file.path) in str(error), f"the message doesn't name the file: {error}")
        check(not cleaned.exists() and not report.exists(), f"a file was left behind by {error}")
        return
    check(summary.read == len(file.raws), f"read {summary.read} records of {len(file.raws)}")
    check(summary.written + summary.dropped == summary.read, f"{summary}")
    check(report.read_text().count("\n") == summary.changed + summary.dropped, f"{summary}: {report.read_text()!r}")
    if summary.written:
        back = list(read_records(cleaned))
        check(len(back) == summary.written, f"{len(back)} records are in the file, {summary.written} were written")
        kind = next(kind for kind in ("preference", "sft", "kto", "prompt") if kind in map(kind_of, file.raws))
        twice = clean_file(cleaned, again, report=second_report, kind=kind)
        check(not twice.changed + twice.dropped, f"cleaned again: {twice}, {second_report.read_text()!r}")
        check(again.read_bytes() == cleaned.read_bytes(), "cleaned again, the file differs")


@contextmanager
def alarm() -> Iterator[None]:
    """Raise `Hang` in the body if it takes more than `SECONDS`."""

    def ring(*_: Any) -> None:
        raise Hang(f"over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- The tests ----------------------------------------------------------------------------------


def test_spoiled_files_end_in_records_or_in_an_error_that_says_where(tmp_path):
    ends: Counter[str] = Counter()

    @SETTINGS
    @given(content=SPOILED)
    def try_one(content):
        (tmp_path / "input").write_bytes(content.data)
        file = File(tmp_path / "input", content)
        with alarm():
            read(file)
            for step in (parse_all, write_back, audit, clean) if len(file.raws) <= MANY else ():
                step(file)
        ends["broken for good" if file.error else "read to the end"] += 1
        ends["unreadable records"] += sum(isinstance(raw.fields, Unreadable) for raw in file.raws)

    try_one()
    assert min(ends["read to the end"], ends["broken for good"], ends["unreadable records"]) > EXAMPLES / 10


@pytest.mark.parametrize("shape", ["parquet", "arrow", "xlsx"])
def test_spoiled_binary_files_end_in_records_or_in_an_error_that_names_the_file(tmp_path, shape):
    ends: Counter[str] = Counter()
    rng = random.Random(shape if "SPOILED_FILES" not in os.environ else None)
    path = tmp_path / "input"
    for _ in range(max(EXAMPLES // 20, 40)):
        path.unlink(missing_ok=True)
        fields = ["질문", "답"] if shape == "xlsx" else ["질문", "답", "n"]
        records = [
            {name: rng.choice(TEXTS) + "a" if name != "n" else [i] for name in fields}
            for i in range(rng.randrange(1, 9))
        ]
        write_records(path, shape, records)
        whole = path.read_bytes()
        check([raw.fields for raw in read_records(path)] == records, f"whole {shape} isn't read as it was written")
        path.write_bytes(spoil_binary(rng, whole))
        try:
            with alarm():
                for raw in read_records(path):
                    check(isinstance(raw.fields, dict | Unreadable), f"{raw}")
        except UserError as error:
            check(re.match(re.escape(str(path)) + "(:|, line)", str(error)), f"{error}")
            check(str(error).isprintable() and len(str(error)) < ONE_SCREEN, f"{error}")
            ends["refused"] += 1
        else:
            ends["read"] += 1
    assert ends["refused"] > 20


def loses_the_last_record(path):
    yield from list(readers.read_records(path))[:-1]


def ends_without_an_error(path):
    try:
        yield from readers.read_records(path)
    except UserError:
        return


def fails_by_another_error(path):
    for raw in readers.read_records(path):
        yield raw
        raise KeyError("prompt")


def hangs(path):
    yield from readers.read_records(path)
    while True:
        time.sleep(0.01)


def counts_from_one(path):
    for raw in readers.read_records(path):
        yield dataclasses.replace(raw, source=dataclasses.replace(raw.source, index=raw.source.index + 1))


def changes_a_text(path):
    for raw in readers.read_records(path):
        changed = isinstance(raw.fields, dict) and "prompt" in raw.fields
        yield dataclasses.replace(raw, fields=raw.fields | {"prompt": "가"}) if changed else raw


def does_not_say_where(path):
    try:
        yield from readers.read_records(path)
    except UserError:
        raise UserError(f"{path}: is broken") from None


def names_a_line_that_is_not_there(path):
    try:
        yield from readers.read_records(path)
    except UserError:
        raise UserError(f"{path}, line 9999: is broken") from None


@pytest.mark.parametrize(
    "reader",
    [
        loses_the_last_record,
        ends_without_an_error,
        fails_by_another_error,
        hangs,
        counts_from_one,
        changes_a_text,
        does_not_say_where,
        names_a_line_that_is_not_there,
    ],
)
def test_a_reader_with_a_fault_is_caught(tmp_path, monkeypatch, reader):
    """Within a hundred files, `read` sees what it looks for."""
    monkeypatch.setitem(globals(), "read_records", reader)
    monkeypatch.setitem(globals(), "SECONDS", 0.3)
    seen: list[type[BaseException]] = []

    def fails(content: Input) -> bool:
        (tmp_path / "input").write_bytes(content.data)
        try:
            with alarm():
                read(File(tmp_path / "input", content))
        except (KeyError, Wrong, Hang) as error:
            seen.append(type(error))
            return True
        return False

    find(SPOILED, fails, settings=settings(SETTINGS, max_examples=100, phases=[Phase.generate]))
    assert (seen[0] is Hang) == (reader is hangs)
