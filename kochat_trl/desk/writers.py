"""Records → files, in the shapes that `readers.py` reads. Nothing is ever overwritten."""

import csv
import json
import reprlib
from collections.abc import Iterable
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
    try:
        return _WRITERS[shape](stream, records)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{stream.name}: half a character ({half!r}) in a text; only JSON can tell it") from None


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


def _write_array(stream: TextIO, records: Iterable[Any]) -> int:
    count = 0
    for count, fields in enumerate(records, start=1):
        text = to_json(fields, indent=4).replace("\n", "\n    ")
        stream.write(f"{'[' if count == 1 else ','}\n    {text}")
    stream.write("\n]\n" if count else "[]\n")
    return count


def _write_lines(stream: TextIO, records: Iterable[Any]) -> int:
    count = 0
    for fields in records:
        stream.write(to_json(fields) + "\n")
        count += 1
    return count


def _write_dialogues(stream: TextIO, records: Iterable[Turns]) -> int:
    count = 0
    for count, turns in enumerate(records, start=1):
        stream.write(DIALOGUE_START + "\n")
        for speaker, content in turns:
            for line in content.split("\n")[1:]:
                if line.strip().startswith((DIALOGUE_START, *(f"{name}:" for name in SPEAKERS))):
                    raise UserError(f"dialogue {count - 1}: a line of a turn begins with {line.strip()[:24]!r}")
            stream.write(f"{speaker}: {content}\n")
    return count


def _write_csv(stream: TextIO, records: Iterable[dict[str, str]]) -> int:
    header: list[str] = []
    count = 0
    for fields in records:
        if not header:
            header = list(fields)
            csv.writer(stream, lineterminator="\n").writerow(header)
        if set(fields) != set(header):
            raise UserError(f"record {count} has other fields than the first, and a CSV file has one header")
        bare = any("\r" in cell for cell in fields.values())  # Python 3.11 puts no quotes around a CR
        quoting: Any = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
        csv.writer(stream, lineterminator="\n", quoting=quoting).writerow([fields[name] for name in header])
        count += 1
    return count


def _write_text(stream: TextIO, records: Iterable[dict[str, str]]) -> int:
    count, begun = 0, False
    for count, fields in enumerate(records, start=1):
        if "\n" in fields["prompt"]:
            raise UserError(f"prompt {count - 1} has more than one line; a text file has one prompt a line")
        if not begun and (start := fields["prompt"].strip()):
            begun = True
            if shape_of(start) != "text":
                raise UserError(f"a text file that begins with {start[:24]!r} would be taken for another shape")
        stream.write(fields["prompt"] + "\n")
    return count


_WRITERS: dict[Shape, Any] = {
    "array": _write_array,
    "lines": _write_lines,
    "dialogues": _write_dialogues,
    "csv": _write_csv,
    "text": _write_text,
    "dataset": _write_lines,
}
