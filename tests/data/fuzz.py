"""Throw broken files at the data layer: `python tests/data/fuzz.py --count 100000 --seed 0`

Each input is a file of one of the shapes that `readers.py` reads, spoiled in some ways. It must end in records or in a
`UserError` that says where, within 5 seconds; an independent reading tells which records there must be. The first
input that fails is saved, and its traceback and the command that repeats it are printed.
"""

import argparse
import csv
import gzip
import io
import json
import random
import re
import signal
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, file_format, read_records
from kochat_trl.data.records import Ranking, RawRecord, RecordError, Turns, Unreadable, kind_of, parse
from kochat_trl.data.writers import write_records
from kochat_trl.desk.curation.audit import check_files
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.errors import UserError

SECONDS = 5.0  # for one input
ONE_SCREEN = 1000  # characters of one message
MANY = 1000  # records; a file that has more is only read: a flipped bit in gzip can make 100,000 empty lines

# --- Files that are as they should be -----------------------------------------------------------

TEXTS = [
    "안녕하세요",
    "불고기용 고기 한우에요?",
    "서울입니다.\n네.",
    "a",
    "ㅋㅋ 😀",
    "\u1112\u1161\u11ab 글",
    "'",
    '말 "음"',
    "\\n",
    " ",
]


def text(rng: random.Random) -> str:
    return rng.choice(TEXTS) + rng.choice(["", str(rng.randrange(100))])


def some_record(rng: random.Random) -> dict[str, Any]:
    one, two = text(rng), text(rng)
    count = rng.randrange(2, 5)
    ranking = rng.sample(range(count), count)
    return rng.choice(
        [
            {"prompt": one, "completion": two, "tokens": 9},
            {"instruction": one, "input": "", "output": two},
            {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]},
            {"prompt": one, "chosen": one, "rejected": two},
            {"prompt": one, **{f"completion_{i}": f"{i} {two}" for i in range(count)}, "ranking": ranking},
            {"prompt": one},
            {"Q": one, "A": two, "label": 0},
        ]
    )


def array(rng: random.Random, records: list[Any]) -> str:
    return json.dumps(records, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.3)


def json_lines(rng: random.Random, records: list[Any]) -> str:
    end = rng.choice(["\n", "\n", "\n\n", "\r\n"])
    return "".join(json.dumps(record, ensure_ascii=rng.random() < 0.3) + end for record in records)


def dialogues(rng: random.Random, records: list[Any]) -> str:
    lines = []
    for _ in records:
        lines.append(DIALOGUE_START)
        first = rng.randrange(10) == 0  # the chatbot, now and then
        lines += [f"{SPEAKERS[(i + first) % 2]}: {text(rng)}" for i in range(2 * rng.randrange(3))]
    return "\n".join(lines) + rng.choice(["", "\n", "\n\n"])


def table(rng: random.Random, records: list[Any]) -> str:
    stream = io.StringIO(newline="")
    end, quoting = rng.choice(["\n", "\r\n"]), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    rows = [["Q", "A", "label"], *([text(rng), text(rng), "0"] for _ in records)]
    csv.writer(stream, lineterminator=end, quoting=quoting).writerows(rows)
    return stream.getvalue()


def prompts(rng: random.Random, records: list[Any]) -> str:
    return "".join(text(rng).replace("\n", " ") + rng.choice(["\n", "\n", "\r\n"]) for _ in records)


SHAPES = {"array": array, "lines": json_lines, "dialogues": dialogues, "csv": table, "text": prompts}

# --- What goes wrong with them ------------------------------------------------------------------

# JSON values that belong into none of the fields; some of them are JSON only by the look of it.
VALUES = [
    *("null", "true", "3", "-1", "-0", "01", "0.5", "1e5", "1e999", "-1E+400", "NaN", "Infinity", "-Infinity", "what"),
    *("", '"', ",", "}", "]", '""', '" "', "[]", "{}", "[[]]", '[""]', '{"a": 1}', '{"a": 1, "a": 2}', "'single'"),
    *("[0, 0]", "[1, 0]", "[[0, 1]]", "[2, null, 0]", "[0, 9]", "[-1, 0]", "[1.0, 0]", "[true, false]", '["1", "0"]'),
    *('[{"role": "user"}]', '[{"a": []}]', '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]'),
    *(r'"\ud800"', r'"가\udfff나"', r'"\ud83d\ude00"', r'"\u0000"', r'"\u2028"', r'"\x"', '"\0"', '"\t"'),
    *("9" * 4000, "9" * 5000, "[" + "9" * 5000 + "]", '"' + "가" * 5000 + '"'),
    *("[" * 200 + "]" * 200, '{"a":' * 300 + "1" + "}" * 300),
    *("[" * 10_000 + "]" * 10_000, "[" * 10_000, '{"a":' * 10_000),
    '{"' + "긴" * 3000 + '": 1, "' + "긴" * 3000 + '": 2}',
]
TOKENS = [
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b'""', b"'", b"\\", b"\\u", b"\\ud800", b"null", b"NaN", b"1e999"),
    *(b"\n", b"\r", b"\r\n", b"\r\r\n", b"\n\n", b"\0", b"\x1a", b"\x1b[2J", b"\x1c"),
    *("\x85".encode(), "\xa0".encode(), "\u2028".encode(), "\u3000".encode(), "\ufeff".encode()),
    *(b"\xff", b"\xff\xfe", b"\xfe\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x1f\x8b"),
    *("안녕".encode("cp949"), "안녕".encode("utf-16"), "café".encode("latin-1"), "안녕".encode()),
    *(b'{"prompt": "a"}', b'"prompt": "a",', b'\n{"prompt": "a"}\n', b'", "completion": "', b"Q,A"),
    *("<사람>:".encode(), "\n<챗봇>: ".encode(), b"<<start", b"<<start conversation>>", b"\n<<start conversation>>\n"),
    *(b"[" * 10_000, b'{"a":' * 10_000, b"9" * 5000, b'"' + b"a" * 140_000),
]


def spoil_value(rng: random.Random, records: list[Any]) -> None:
    """Put a wrong value into a field of one record, leave the field out, or put it in the place of the record."""
    i = rng.randrange(len(records))
    value = f"@{rng.randrange(len(VALUES))}@"  # what stands for a value that `json` wouldn't write
    if not isinstance(records[i], dict) or rng.random() < 0.1:
        records[i] = value
        return
    name = rng.choice([*records[i], *["ranking"] * 3, "completion_2", "messages", "input", "x"])
    records[i][name] = value
    if rng.random() < 0.2:
        del records[i][name]


def put_values(content: str) -> str:
    return re.sub(r'"@(\d+)@"', lambda match: VALUES[int(match[1])], content)


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """One of the accidents that happen to the bytes of a file."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    before, part, after = data[:start], data[start:end], data[end:]
    few = data[start : start + rng.randrange(1, 9)]
    decoded = part.decode(errors="ignore")
    return rng.choice(
        [
            lambda: before,
            lambda: after,
            lambda: before + after,
            lambda: before + data[start + len(few) :],
            lambda: before + part + part + after,
            lambda: after + part + before,
            lambda: data + data,
            lambda: before + rng.randbytes(rng.randrange(1, 5)) + part + after,
            lambda: before + bytes([rng.randrange(256)]) + data[start + 1 :],
            lambda: before + bytes(byte ^ 1 << rng.randrange(8) for byte in few) + data[start + len(few) :],
            lambda: before + rng.choice(TOKENS) + part + after,
            lambda: before + rng.choice(TOKENS) + part + rng.choice(TOKENS) + after,
            lambda: before + rng.choice(TOKENS) + after,
            lambda: rng.choice(TOKENS) + data,
            lambda: data + rng.choice(TOKENS),
            lambda: before + some_file(rng, 0).data + part + after,
            lambda: before + decoded.encode("cp949", errors="ignore") + after,
            lambda: before + decoded.encode("utf-16", errors="ignore") + after,
            lambda: before + decoded.encode("latin-1", errors="replace") + after,
            lambda: before + part.replace(b"\n", rng.choice([b"\r", b"\r\n", b"", b"\n\n"])) + after,
            lambda: data.replace(b"\r", b"").replace(b"\n", b"\r"),
            lambda: before + part.replace(b'"', rng.choice([b"", b"'", b'""', b"\xe2\x80\x9c"])) + after,
            lambda: before + part.replace(b",", rng.choice([b"", b";", b",,", b"\t"])) + after,
            lambda: rng.choice(
                [b"", b" ", b"\n", b"\r", b"\0", b"\xef\xbb\xbf", b"[]", b"{}", b"[", b"null", b"\x1f\x8b"]
            ),
        ]
    )()


@dataclass(frozen=True)
class Input:
    """The bytes of a file. Where nothing was done to them, also what they are, and how many records they hold."""

    data: bytes
    shape: str | None = None
    count: int | None = None


def some_file(rng: random.Random, accidents: int) -> Input:
    shape = rng.choice(list(SHAPES))
    records: list[Any] = [some_record(rng) for _ in range(rng.randrange(1, 6))]
    values = rng.choice([0, 0, 1, 3]) if shape in ("array", "lines") else 0
    for _ in range(values):
        spoil_value(rng, records)
    data = put_values(SHAPES[shape](rng, records)).encode()
    for _ in range(accidents):
        data = spoil_bytes(rng, data)
    if rng.random() < 0.2:
        data = b"\xef\xbb\xbf" + data
    if rng.random() < 0.1:
        data = gzip.compress(data, 1, mtime=0)
        if rng.random() < 0.5:
            return Input(spoil_bytes(rng, data))
    return Input(data) if values or accidents else Input(data, shape, len(records))


def input_of(seed: int, number: int) -> Input:
    """Input `number` of a seed: it doesn't hang on the ones before it."""
    rng = random.Random(f"{seed}, {number}")
    return some_file(rng, rng.choice([0, 1, 1, 2, 4]))


# --- What they must be read as ------------------------------------------------------------------

BROKEN = object()  # in the place of a record that can't be read while the next one can
TOO_DEEP = object()  # how deep the parser goes hangs on who calls it


def bytes_inside(data: bytes) -> bytes | None:
    """The bytes of a file, unpacked if they are gzip; None if they can't be."""
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error):
        return None


def json_value(content: str) -> Any:
    """The value of a JSON text; `BROKEN` if it isn't JSON, or has a field twice or a number that no float holds."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    def finite(number: str) -> float:
        if abs(value := float(number)) == float("inf"):
            raise ValueError
        return value

    try:
        return json.loads(content, object_pairs_hook=once, parse_constant=lambda _: 1 / 0, parse_float=finite)
    except (ValueError, ZeroDivisionError):
        return BROKEN
    except RecursionError:
        return TOO_DEEP


def rows_of(content: str) -> list[list[str]] | None:
    """The rows of a CSV file from its header on; None if it isn't strict CSV."""
    try:
        rows = [row for row in csv.reader(io.StringIO(content, newline="\n"), strict=True) if row]
    except csv.Error:
        return None
    while rows and not "".join(rows[0]).strip():
        del rows[0]
    return rows


def expected_fields(shape: str, content: str) -> list[Any] | None:
    """What the records of a file must be; None if it isn't whole, so that reading it must end in an error.

    Raises `LookupError` where this can't tell.
    """
    lines = content.removesuffix("\n").split("\n")
    if "\r" in content.strip() and "\n" not in content.lstrip():
        return None  # lines that end in CR alone
    if shape == "array":
        value = json_value(content)
        if value is TOO_DEEP:
            raise LookupError
        return value if isinstance(value, list) else None
    if shape == "lines":
        return [json_value(line) for line in lines if line.strip(" \t\r\n")]
    if shape == "text":
        return [{"prompt": line.rstrip("\r\n")} for line in lines]
    if shape == "csv":
        rows = rows_of(content)
        if rows is None:
            raise LookupError  # a row may be broken by itself, or for good
        header = [cell.strip() for cell in rows[0]]
        named = all(re.fullmatch(r"\w+", cell) for cell in header) and len(set(header)) == len(header)
        if not named or not {"prompt", "instruction", "Q"}.intersection(header):
            return None
        return [dict(zip(header, row, strict=True)) if len(row) == len(header) else BROKEN for row in rows[1:]]
    assert shape == "dialogues"
    found: list[Any] = []
    for line in map(str.strip, lines):
        turn = re.match(r"<(사람|챗봇)>:", line)
        if line.startswith("<<start conversation>>"):
            if line != "<<start conversation>>":
                return None
            found.append([])
        elif turn:
            found[-1].append(turn[0][:-1])
        elif line and not found[-1]:
            return None
    return found


def is_as_expected(fields: Any, expected: Any) -> bool:
    if expected in (BROKEN, TOO_DEEP) or isinstance(fields, Unreadable):
        return expected is TOO_DEEP or (isinstance(fields, Unreadable) and expected is BROKEN)
    if isinstance(fields, Turns):
        return [speaker for speaker, _ in fields] == expected
    return fields == expected


def is_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) for record in value)


# --- The steps ----------------------------------------------------------------------------------


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
        shape = file_format(file.path).shape
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
        expected = expected_fields(shape, content)
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
    """Each record can be used, or an error says where it is and why not; for every kind, under both orders."""
    for raw, kind, order in product(file.raws, ("sft", "preference", "prompt"), ("best_first", "rank_of")):
        check(kind_of(raw) in ("sft", "preference", "prompt", None), "kind_of")
        try:
            record = parse(raw, kind, order)
        except RecordError as error:
            check_located(error, file)
            check(error.source == raw.source, f"{error.source} instead of {raw.source}")
        else:
            if isinstance(record, Ranking):
                pairs = {(pair.better, pair.worse) for pair in record.pairs()}
                check(pairs and max(map(max, pairs)) < len(record.completions), f"{record}: {pairs}")


def write_back(file: File) -> None:
    """Records that were read can be written in the same shape, and are read back as they were."""
    fields = [raw.fields for raw in file.raws if isinstance(raw.fields, dict | Turns)]
    if file.error or not fields:
        return
    again = file.path.with_name("written")
    again.unlink(missing_ok=True)
    shape = file_format(file.path).shape
    try:
        write_records(again, shape, fields)
    except UserError as error:
        check(not again.exists(), f"a file was left behind by {error}")
        return
    back = [raw.fields for raw in read_records(again)]
    check(back == fields, f"{shape} written and read again is {back!r:.300}, not {fields!r:.300}")


def audit(file: File) -> None:
    """`kochat data check` counts the same records, each as usable or as an error, and says what can't be read."""
    report = check_files([str(file.path)]).files[0]
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
        kind = next(kind for kind in ("preference", "sft", "prompt") if kind in map(kind_of, file.raws))
        twice = clean_file(cleaned, again, report=second_report, kind=kind)
        check(not twice.changed + twice.dropped, f"cleaned again: {twice}, {second_report.read_text()!r}")
        check(again.read_bytes() == cleaned.read_bytes(), "cleaned again, the file differs")


# What is done with each input, in this order. `read` fills in what the others look at.
STEPS: dict[str, Callable[[File], None]] = {
    "read": read,
    "parse": parse_all,
    "write": write_back,
    "audit": audit,
    "clean": clean,
}

# --- The run ------------------------------------------------------------------------------------


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


@dataclass
class Failure:
    """An input that ended as none must."""

    seed: int
    number: int
    step: str
    error: BaseException
    data: bytes


def fuzz(count: int, seed: int, folder: Path, steps: list[str], start: int = 0) -> tuple[Counter[str], Failure | None]:
    """Run `steps` on `count` inputs. Return how they ended, and the first that ended as none must."""
    ends: Counter[str] = Counter()
    path = folder / "input"
    for number in range(start, start + count):
        content = input_of(seed, number)
        path.write_bytes(content.data)
        file = File(path, content)
        step = ""
        try:
            with alarm():
                for step in steps:
                    STEPS[step](file)
                    if len(file.raws) > MANY:
                        break
        except (Exception, Hang) as error:
            return ends, Failure(seed, number, step, error, content.data)
        ends["broken for good" if file.error else "read to the end"] += 1
        ends["records"] += len(file.raws)
        ends["unreadable records"] += sum(isinstance(raw.fields, Unreadable) for raw in file.raws)
    return ends, None


def main() -> None:
    parser = argparse.ArgumentParser(description="Throw broken files at the data layer.")
    parser.add_argument("--count", type=int, default=100_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="`read` comes first")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        ends, failure = fuzz(options.count, options.seed, Path(folder), options.steps, options.start)
    seconds = time.perf_counter() - begun
    print(
        f"{ends['read to the end'] + ends['broken for good']:,} inputs in {seconds:.0f} s, {', '.join(options.steps)}"
    )
    print(", ".join(f"{end}: {number:,}" for end, number in ends.items()))
    if failure:
        saved = Path(f"fuzz-{failure.seed}-{failure.number}.bin")
        saved.write_bytes(failure.data)
        traceback.print_exception(failure.error)
        repeat = f"python tests/data/fuzz.py --seed {failure.seed} --start {failure.number} --count 1"
        raise SystemExit(f"\ninput {failure.number} failed in '{failure.step}'; saved as {saved}. Again: {repeat}")


if __name__ == "__main__":
    main()
