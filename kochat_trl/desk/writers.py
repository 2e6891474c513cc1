"""Records → files, in the shapes that `readers.py` reads. Nothing is ever overwritten."""

import csv
import json
import reprlib
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, Shape, shape_of
from kochat_trl.data.records import Turns
from kochat_trl.errors import UserError
from kochat_trl.files import new_file


def write_records(path: str | Path, shape: Shape, records: Iterable[Any]) -> int:
    """Write the fields of records (dicts, or `Turns` for dialogues) as a new file, and return how many there were.

    `array` is laid out as KoChatGPT's files are, indented by 4. A dataset is written as JSON lines.

    Raises `UserError` if `path` exists, or if a record can't be told in that shape.
    """
    with new_file(path) as stream:
        return write_stream(stream, shape, records)


def write_stream(stream: TextIO, shape: Shape, records: Iterable[Any]) -> int:
    """`write_records` into an open file."""
    count = 0
    try:
        for text in _TEXTS[shape](records):
            stream.write(text)
            count += 1
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{stream.name}: half a character ({half!r}) in a text; only JSON can tell it") from None
    if shape == "array":
        stream.write("\n]\n" if count else "[]\n")
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


# Each of these yields a text for each record.


def _array(records: Iterable[Any]) -> Iterator[str]:
    for i, fields in enumerate(records):
        text = to_json(fields, indent=4).replace("\n", "\n    ")
        yield f"{',' if i else '['}\n    {text}"


def _lines(records: Iterable[Any]) -> Iterator[str]:
    return (f"{to_json(fields)}\n" for fields in records)


def _dialogues(records: Iterable[Turns]) -> Iterator[str]:
    for i, turns in enumerate(records):
        for line in (line.strip() for _, content in turns for line in content.split("\n")[1:]):
            if line.startswith((DIALOGUE_START, *(f"{name}:" for name in SPEAKERS))):
                raise UserError(f"dialogue {i}: a line of a turn begins with {line[:24]!r}")
        yield "".join([f"{DIALOGUE_START}\n", *(f"{speaker}: {content}\n" for speaker, content in turns)])


def _csv(records: Iterable[dict[str, str]]) -> Iterator[str]:
    header: list[str] = []
    for i, fields in enumerate(records):
        text = StringIO()
        if not header:
            header = list(fields)
            csv.writer(text, lineterminator="\n").writerow(header)
        if set(fields) != set(header):
            raise UserError(f"record {i} has other fields than the first, and a CSV file has one header")
        bare = any("\r" in cell for cell in fields.values())  # Python 3.11 puts no quotes around a CR
        quoting: Any = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
        csv.writer(text, lineterminator="\n", quoting=quoting).writerow([fields[name] for name in header])
        yield text.getvalue()


def _text(records: Iterable[dict[str, str]]) -> Iterator[str]:
    begun = False
    for i, prompt in enumerate(fields["prompt"] for fields in records):
        if "\n" in prompt:
            raise UserError(f"prompt {i} has more than one line; a text file has one prompt a line")
        if not begun and (start := prompt.strip()):
            begun = True
            if shape_of(start) != "text":
                raise UserError(f"a text file that begins with {start[:24]!r} would be taken for another shape")
        yield f"{prompt}\n"


_TEXTS: dict[Shape, Any] = {"array": _array, "lines": _lines, "dialogues": _dialogues, "csv": _csv, "text": _text}
_TEXTS["dataset"] = _lines
