"""Files → records: raw ones with their file, line and index, and what is made of them.

The shape is sniffed from the first bytes, never guessed from the file's name: KoChatGPT's `.jsonl` files are JSON
arrays, and one of them is not JSON at all. Files are read as a stream, so what they take in memory doesn't grow with
the number of records, unless these are all in one line.
"""

import csv
import gzip
import json
import math
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from kochat_trl.data.records import ANSWER_FIELDS, BrokenRecordsError, RawRecord, RecordError, Source, Turns, Unreadable
from kochat_trl.errors import UserError

from tqdm import tqdm

Parsed = TypeVar("Parsed")
Shape = Literal["array", "lines", "dialogues", "csv", "text", "dataset"]
DIALOGUE_START = "<<start conversation>>"
SPEAKERS = ("<사람>", "<챗봇>")
PROMPT_FIELDS = {prompt for prompt, _ in ANSWER_FIELDS}  # a CSV file's header has one of these
DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".txt", ".gz"}  # no name on the Hub ends so

_GZIP = b"\x1f\x8b"
_ARRAY = re.compile(r"""\[\s*(?:$|[\[\]{}"'\d,-])""")  # and not a prompt such as "[긴급] 도와줘"
_BLANK = re.compile(r"[ \t\r\n]*")
_LOOKS_CUT = re.compile(r'[\]},]|"\w+"\s*:|<사람>|<챗봇>|<<')  # a first line that is the middle of another shape
_LINES_AT_ONCE = 256  # lines of an array that are parsed together


@dataclass(frozen=True)
class FileFormat:
    """What a file was found to be. `crlf` is about its first line."""

    shape: Shape
    bom: bool = False
    crlf: bool = False
    gzip: bool = False


def read_records(path: str | Path) -> Iterator[RawRecord]:
    """Yield the records of a file or of a dataset on the Hub, in order.

    A file is a JSON array, JSON lines, KoChatGPT's dialogues, CSV with a header of known field names, or plain text
    with a prompt a line; UTF-8, with or without BOM, CRLF or LF, gzipped or not. A path that isn't a file is read by
    `datasets`: `owner/name` or `owner/name:split` on the Hub (`train` unless given), or a folder of that layout.

    A JSON line or CSV row that is broken by itself is yielded as `Unreadable`, since the ones after it can be read.
    Raises `UserError`, with the line, if the file is missing, isn't UTF-8 or is broken for good.
    """
    file = str(path)
    if _is_dataset(file):
        yield from _read_dataset(file)
        return
    with _open(file) as stream:
        lines = _decode(file, stream)
        shape, head, _ = _sniff(file, lines)
        yield from _READ[shape](file, chain(head, lines))


def read_parsed(
    files: Sequence[str],
    parse: Callable[[RawRecord], Parsed],
    invalid: list[RecordError],
    skip_invalid: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[Source, Parsed]]:
    """Yield what `parse` makes of each of the first `limit` records of `files`, and where it came from.

    The errors of those that it raises a `RecordError` for are added to `invalid`. All files are read before it raises
    `BrokenRecordsError` for them, so that a person sees all that is wrong; it doesn't if `skip_invalid`.
    """
    raws = (raw for file in files for raw in tqdm(read_records(file), desc=f"Reading {file}", delay=2, leave=False))
    read = 0
    for raw in islice(raws, limit):
        read += 1
        try:
            parsed = parse(raw)
        except RecordError as error:
            invalid.append(error)
        else:
            yield raw.source, parsed
    if invalid and not skip_invalid:
        raise BrokenRecordsError(invalid, read)


def file_format(path: str | Path) -> FileFormat:
    """The format of the file, told from its beginning. Raises as `read_records` does."""
    file = str(path)
    if _is_dataset(file):
        return FileFormat("dataset")
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{file}: is a pipe, which can be read only once; save it to a file first")
    with _open(file) as stream:
        shape, head, bom = _sniff(file, _decode(file, stream))
        return FileFormat(shape, bom, head[0].endswith("\r\n"), isinstance(stream, gzip.GzipFile))


# --- Bytes → lines of text ----------------------------------------------------------------------


@contextmanager
def _open(file: str) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unzipped; it is opened once, so that a pipe can be read, too."""
    try:
        stream = open(file, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}. Check the path.") from None
    with stream:
        yield gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == _GZIP else stream


def _decode(file: str, stream: BufferedIOBase) -> Iterator[str]:
    """The lines of a file, with their ends; a line ends at `\\n` alone."""
    number, line = 0, b""
    try:
        for number, line in enumerate(iter(stream.readline, b""), start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{file}: is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8")
            yield line.decode()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, line {number + 1}: can't be read on: {error}") from None
    except UnicodeDecodeError as error:
        where = f"{file}, line {number}"
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line.{_try_cp949(line)}") from None


def _try_cp949(line: bytes) -> str:
    try:
        text = line.decode("cp949")
    except UnicodeDecodeError:
        return " Convert the file to UTF-8 first."
    start = text.strip()[:30]
    return f" As CP949 it reads {start!r}; if that is right, convert it: iconv -f CP949 -t UTF-8"


def _sniff(file: str, lines: Iterator[str]) -> tuple[Shape, list[str], bool]:
    """The shape of a file, the lines that were read to tell it, without a BOM, and whether there was one."""
    first = next(lines, "")
    bom, head = first.startswith("\ufeff"), [first.lstrip("\ufeff")]
    while not head[-1].strip() and (line := next(lines, "")):
        head.append(line)
    start = head[-1].strip().lstrip("\ufeff")
    if not start:
        raise UserError(f"{file}: is empty")
    shape = shape_of(start)
    if shape is None:
        raise UserError(
            f"{file}, line {len(head)}: found {start[:40]!r}, expected a JSON array ('['), JSON lines ('{{'), "
            f"dialogues ('{DIALOGUE_START}'), CSV with a header such as Q,A,label, or a prompt a line"
        )
    if "\r" in start and not head[-1].endswith("\n"):
        raise UserError(f"{file}, line {len(head)}: ends of CR alone, expected LF or CRLF. Convert it: tr '\\r' '\\n'")
    return shape, head, bom


def shape_of(start: str) -> Shape | None:
    """The shape of a file whose first line with text begins with `start`; None if it is the middle of something."""
    if _ARRAY.match(start):
        return "array"
    if start.startswith("{"):
        return "lines"
    if start.startswith(DIALOGUE_START):
        return "dialogues"
    if "\0" in start or _LOOKS_CUT.match(start):
        return None
    header = [cell.strip() for cell in start.strip().replace('"', "").split(",")]
    return "csv" if _are_fields(header) else "text"


def _are_fields(names: list[str]) -> bool:
    """Whether `names` is the header of a CSV file."""
    return all(re.fullmatch(r"\w+", name) for name in names) and not PROMPT_FIELDS.isdisjoint(names)


# --- JSON ---------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"field {reprlib.repr(name)} is there twice")
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {reprlib.repr(number)} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_json, parse_float=_finite)


def _explain(error: ValueError | RecursionError) -> str:
    """What is wrong with a piece of JSON. Not every error is a JSONDecodeError: a number of 5,000 digits isn't."""
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


class _Window:
    """The stretch of an array's text that is being parsed, and the line of the file that `position` is in."""

    def __init__(self, lines: Iterator[str]):
        self._lines = lines
        self.text, self.position, self.line = "", 0, 1

    def fill(self, count: int) -> bool:
        """Drop what is before `position` and read `count` more lines; False at the end of the file."""
        more = "".join(islice(self._lines, count))
        if more:
            self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def move(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skip blanks; the character that follows, empty at the end of the file."""
        while True:
            self.move(_BLANK.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or not self.fill(_LINES_AT_ONCE):
                return self.ahead(1)

    def ahead(self, count: int) -> str:
        return self.text[self.position : self.position + count]

    def value(self) -> Any:
        """Parse the JSON value here and move behind it. Raises `ValueError` or `RecursionError`."""
        count = _LINES_AT_ONCE
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                self.move(end)
                return value
            except json.JSONDecodeError as error:
                # No JSON token goes over a line's end, so text that was cut there fails at its end, if at all.
                if self.text[error.pos :].strip(" \t\r\n,") or not self.fill(count):
                    raise
                count *= 2  # a record of a great many lines takes linear time


def _read_array(file: str, lines: Iterator[str]) -> Iterator[RawRecord]:
    window = _Window(lines)
    if window.next_character() != "[":  # but a blank that JSON doesn't know
        raise UserError(f"{file}, line {window.line}: found {window.ahead(20)!r}, expected '['")
    window.move(window.position + 1)
    for index in count():
        if window.next_character() == "]" and index == 0:
            break
        line = window.line
        try:
            fields = window.value()
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line += window.text.count("\n", window.position, error.pos)
            raise UserError(f"{file}, line {line} (record {index}): {_explain(error)}") from None
        yield RawRecord(Source(file, index, line), fields)
        if window.next_character() == "]":
            break
        if window.next_character() != ",":
            where = f"{file}, line {window.line}"
            raise UserError(f"{where}: found {window.ahead(20)!r}, expected ',' or ']' after record {index}")
        window.move(window.position + 1)
    window.move(window.position + 1)
    if window.next_character():
        where = f"{file}, line {window.line}"
        raise UserError(f"{where}: found {window.ahead(40)!r} after the JSON array, expected nothing")


def _read_lines(file: str, lines: Iterator[str]) -> Iterator[RawRecord]:
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip(" \t\r\n"))
    for index, (number, line) in enumerate(filled):
        try:
            fields: Any = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            fields = Unreadable(_explain(error), "a JSON object in one line")
        yield RawRecord(Source(file, index, number), fields)


# --- Other shapes -------------------------------------------------------------------------------


def _read_dialogues(file: str, lines: Iterator[str]) -> Iterator[RawRecord]:
    """Records of `Turns`; a line without a speaker continues the turn before it."""
    index, start = -1, 0
    turns: list[tuple[str, list[str]]] = []
    for number, line in enumerate(chain(lines, [DIALOGUE_START]), start=1):  # the end is told as a beginning is
        content = line.strip()
        speaker = next((speaker for speaker in SPEAKERS if content.startswith(f"{speaker}:")), None)
        if content.startswith(DIALOGUE_START):
            if content != DIALOGUE_START:
                raise UserError(f"{file}, line {number}: found {content[:40]!r}, expected '{DIALOGUE_START}' alone")
            if index >= 0:
                fields = Turns((speaker, "\n".join(its_lines).strip()) for speaker, its_lines in turns)
                yield RawRecord(Source(file, index, start), fields)
            index, start, turns = index + 1, number, []
        elif speaker:
            turns.append((speaker, [line.partition(":")[2].rstrip("\r\n")]))
        elif turns:
            turns[-1][1].append(line.rstrip("\r\n"))
        elif content:
            raise UserError(f"{file}, line {number}: found {content[:40]!r}, expected '<사람>:' or '<챗봇>:'")


def _read_csv(file: str, lines: Iterator[str]) -> Iterator[RawRecord]:
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    index = 0
    while True:
        number = rows.line_num + 1
        fields: Any
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(f"{file}, line {number}: a quote is opened here and not closed") from None
            if "field limit" in str(error):
                found = f"a cell of over {csv.field_size_limit():,} characters"
                raise UserError(f"{file}, line {number}: {found}; is a quote opened and not closed?") from None
            if not header:
                raise UserError(f"{file}, line {number}: broken CSV: {error}") from None
            fields = Unreadable(f"broken CSV: {error}", f"{len(header)} cells")
        else:
            if row is None:
                return
            if not row or not (header or "".join(row).strip()):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                if len(set(header)) < len(header) or not _are_fields(header):
                    found = f"found the header {reprlib.repr(header)}"
                    raise UserError(f"{file}, line {number}: {found}, expected names of fields, none twice")
                continue
            if len(row) == len(header):
                fields = dict(zip(header, row, strict=True))
            else:
                fields = Unreadable(f"{len(row)} cells", f"{len(header)} cells: {','.join(header)[:80]}")
        yield RawRecord(Source(file, index, number), fields)
        index += 1


def _read_text(file: str, lines: Iterator[str]) -> Iterator[RawRecord]:
    for index, line in enumerate(lines):
        yield RawRecord(Source(file, index, index + 1), {"prompt": line.rstrip("\r\n")})


_READ = {"array": _read_array, "lines": _read_lines, "dialogues": _read_dialogues, "csv": _read_csv, "text": _read_text}


def _is_dataset(file: str) -> bool:
    if os.path.exists(file):
        return os.path.isdir(file)
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", file) is not None and Path(file).suffix not in DATA_SUFFIXES


def _read_dataset(file: str) -> Iterator[RawRecord]:
    from datasets import load_dataset  # takes seconds to import, and most data is in files

    name, _, split = file.partition(":")
    try:
        for index, row in enumerate(load_dataset(name, split=split or "train", streaming=True)):
            fields = {field: value for field, value in row.items() if value is not None}  # `datasets` fills in None
            yield RawRecord(Source(file, index, None), fields)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: there is no such file, and `datasets` can't load it: {reason}") from None
