"""Records → files, in the formats that `readers.py` reads. Nothing is ever overwritten."""

import csv
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, cast

from kochat_trl.data.formats.beginning import Beginning
from kochat_trl.data.formats.formats import tell
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, FileFormat, FileShape
from kochat_trl.data.shapes import SPEAKER
from kochat_trl.desk.binary import write_arrow, write_parquet, write_sheet
from kochat_trl.errors import UserError
from kochat_trl.files import name_of_new, new_file

Fields = dict[str, Any]
_SPEAKERS = {"user": SPEAKERS[0], "assistant": SPEAKERS[1]}


def write_records(path: str | Path, form: FileFormat | FileShape, records: Iterable[Any]) -> int:
    """Write the fields of records as a new file in the format `form`, and return how many there were.

    A text format is written as UTF-8 with LF line ends, not packed. `array` is laid out as KoChatGPT's files are,
    indented by 4; `object` has its wrapper around the records; a dataset is written as JSON lines.

    Raises `UserError` if `path` exists, or if a record can't be told in that format.
    """
    with new_file(path) as stream:
        return write_stream(stream, form, records)


def write_stream(stream: TextIO, form: FileFormat | FileShape, records: Iterable[Any]) -> int:
    """`write_records` into an open file."""
    form = form if isinstance(form, FileFormat) else FileFormat(form)
    count = 0

    def counted() -> Iterator[Any]:
        nonlocal count
        for count, fields in enumerate(records, start=1):  # noqa: B007
            yield fields

    if form.shape in _BINARY:
        _BINARY[form.shape](cast(Any, stream).buffer, counted())
        return count
    try:
        for text in _TEXTS[form.shape](counted(), form, name_of_new(stream)):
            stream.write(text)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{stream.name}: half a character ({half!r}) in a text; only JSON can tell it") from None
    return count


def to_json(fields: Any, indent: int | None = None) -> str:
    """`fields` as JSON, Korean as it is; half characters, which UTF-8 can't hold, are escaped.

    Raises `UserError` if JSON can't hold a value, such as a date in a dataset.
    """
    try:
        text = json.dumps(fields, ensure_ascii=False, indent=indent)
    except TypeError as error:
        raise UserError(f"{reprlib.repr(fields)}: {error}; leave the field out of the dataset") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(fields, indent=indent)
    return text


# Each of these yields the text of a file, bit by bit, from its records, its format and its name.


def _array(records: Iterable[Any], *_: Any) -> Iterator[str]:
    begun = False
    for fields in records:
        yield f"{',' if begun else '['}\n{_indented(fields, 1)}"
        begun = True
    yield "\n]\n" if begun else "[]\n"


def _object(records: Iterable[Any], form: FileFormat, _: str) -> Iterator[str]:
    """The wrapper, with the records in the place of its holder."""
    holder = "data" if form.holder is None else form.holder
    yield "{"
    for i, (name, value) in enumerate((form.wrapper or {holder: []}).items()):
        yield f"{',' if i else ''}\n    {to_json(name)}: "
        if name != holder:
            yield to_json(value, indent=4).replace("\n", "\n    ")
            continue
        begun = False
        for fields in records:
            yield f"{',' if begun else '['}\n{_indented(fields, 2)}"
            begun = True
        yield "\n    ]" if begun else "[]"
    yield "\n}\n"


def _indented(fields: Any, depth: int) -> str:
    blanks = depth * "    "
    return blanks + to_json(fields, indent=4).replace("\n", f"\n{blanks}")


def _objects(records: Iterable[Any], form: FileFormat, name: str) -> Iterator[str]:
    texts = _told_apart((to_json(fields, indent=4) for fields in records), form, name)
    for i, text in enumerate(texts):
        yield text + (" " if i == 0 and text == "{}" else "\n")  # a first line of one object would tell JSON lines


def _lines(records: Iterable[Any], form: FileFormat, name: str) -> Iterator[str]:
    return (f"{text}\n" for text in _told_apart(map(to_json, records), form, name))


def _told_apart(texts: Iterator[str], form: FileFormat, name: str) -> Iterator[str]:
    """`texts` of records. Raises `UserError` if there is only one, and it would be taken for what holds the records."""
    first = list(islice(texts, 2))
    told = _told(name, first, form.options) if len(first) == 1 and first[0].startswith("{") else form
    if told is None or told.shape == "object":
        raise UserError("one record with a list of objects, alone in a file, would be taken for a list of records")
    yield from chain(first, texts)


def _told(name: str, lines: Iterable[str], options: ReadingOptions) -> FileFormat | None:
    """What a file of that name would be taken for; None if it would be refused."""
    try:
        return tell(Beginning(name, iter(StringIO("".join(lines), newline="\n")), options))[0]
    except UserError:
        return None


def _dialogues(records: Iterable[Fields], *_: Any) -> Iterator[str]:
    for i, fields in enumerate(records):
        turns = _turns(i, fields)
        for line in (line.strip() for _, content in turns for line in content.split("\n")[1:]):
            if line.startswith((DIALOGUE_START, *(f"{name}:" for name in SPEAKERS))):
                raise UserError(f"dialogue {i}: a line of a turn begins with {line[:24]!r}")
        yield "".join([f"{DIALOGUE_START}\n", *(f"{speaker}: {content}\n" for speaker, content in turns)])


def _turns(i: int, fields: Fields) -> list[tuple[str, str]]:
    """The speaker and the text of each turn; the roles may be `<사람>` and `<챗봇>` or any other names of these."""
    messages = fields.get("messages")
    if fields.keys() != {"messages"} or not isinstance(messages, list):
        raise UserError(f"dialogue {i}: found the fields {reprlib.repr(list(fields))}, expected messages alone")
    turns = []
    for message in messages:
        whole = isinstance(message, dict) and message.keys() == {"role", "content"}
        role = str(message["role"]).strip().lower() if whole else ""
        if SPEAKER.get(role) not in _SPEAKERS or not isinstance(message["content"], str):
            raise UserError(f"dialogue {i}: found {reprlib.repr(message)}, expected a turn of {' or '.join(SPEAKERS)}")
        turns.append((_SPEAKERS[SPEAKER[role]], message["content"]))
    return turns


def _csv(records: Iterable[dict[str, str]], form: FileFormat, name: str) -> Iterator[str]:
    header: list[str] = []
    for i, fields in enumerate(records):
        text = StringIO()
        if not header:
            header = list(fields)
            csv.writer(text, lineterminator="\n", delimiter=form.delimiter).writerow(header)
            told = _told(name, [text.getvalue()], form.options)
            if told is None or (told.shape, told.delimiter) != ("csv", form.delimiter):
                suffix = ".tsv" if form.delimiter == "\t" else ".csv"
                raise UserError(f"a table of that name would be taken for something else; name it {suffix}")
        if set(fields) != set(header):
            raise UserError(f"record {i} has other fields than the first, and a table has one header")
        cells = [fields[name] for name in header]
        if (other := next((cell for cell in cells if not isinstance(cell, str)), None)) is not None:
            raise UserError(f"record {i}: found {reprlib.repr(other)} in a field, and a table holds texts")
        bare = any("\r" in cell for cell in cells)  # Python 3.11 puts no quotes around a CR
        quoting: Any = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
        csv.writer(text, lineterminator="\n", delimiter=form.delimiter, quoting=quoting).writerow(cells)
        yield text.getvalue()


def _text(records: Iterable[dict[str, str]], form: FileFormat, name: str) -> Iterator[str]:
    lines = _prompts(records)
    head: list[str] = []
    while sum(bool(line.strip()) for line in head) < _TOLD_BY and (more := list(islice(lines, 1))):
        head += more
    if any(map(str.strip, head)):
        start = next(line.strip() for line in head if line.strip())[:24]
        told = _told(name, head, form.options)
        if told is None or told.shape != "text":
            raise UserError(f"a text file that begins with {start!r} would be taken for another shape")
    yield from chain(head, lines)


_TOLD_BY = 20  # lines, which tell a table from text


def _prompts(records: Iterable[dict[str, str]]) -> Iterator[str]:
    for i, prompt in enumerate(fields["prompt"] for fields in records):
        if "\n" in prompt:
            raise UserError(f"prompt {i} has more than one line; a text file has one prompt a line")
        yield f"{prompt}\n"


_TEXTS: dict[FileShape, Callable[[Iterable[Any], FileFormat, str], Iterator[str]]] = {
    "array": _array,
    "lines": _lines,
    "dataset": _lines,
    "objects": _objects,
    "object": _object,
    "dialogues": _dialogues,
    "csv": _csv,
    "text": _text,
}
_BINARY: dict[FileShape, Callable[[Any, Iterable[Any]], None]] = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "xlsx": write_sheet,
}
