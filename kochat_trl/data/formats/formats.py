"""The table of formats: how each is told from what is in a file, and what reads it."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from kochat_trl.data.formats.beginning import Beginning, FileFormat, FileShape, Located
from kochat_trl.data.formats.columnar import read_arrow, read_parquet
from kochat_trl.data.formats.hub import is_dataset, read_dataset
from kochat_trl.data.formats.json_text import tell_array, tell_objects
from kochat_trl.data.formats.lines import Opened, decoded, open_file
from kochat_trl.data.formats.plain import DIALOGUE_START, tell_dialogues, tell_said, tell_text
from kochat_trl.data.formats.sheets import is_workbook, read_sheet
from kochat_trl.data.formats.tables import tell_table
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.errors import UserError

_Told = tuple[FileFormat, Iterator[Located]]

# FileShape → what its files begin with, whether that says all, and what reads them.
BINARY: dict[FileShape, tuple[tuple[bytes, ...], Callable[[str, BinaryIO], bool], Callable[..., Iterator[Located]]]] = {
    "parquet": ((b"PAR1",), lambda *_: True, read_parquet),
    "arrow": ((b"ARROW1\0\0", b"\xff\xff\xff\xff"), lambda *_: True, read_arrow),
    "xlsx": ((b"PK\x03\x04", b"PK\x05\x06"), is_workbook, read_sheet),
}
_OLD_EXCEL = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # of .xls, and of .xlsx with a password

# Name → what tells it by the first lines and reads it, or says None; the first one that tells it reads it.
TEXT: dict[str, Callable[[Beginning], _Told | None]] = {
    "prompts, as `plain_text` says": tell_said,
    "array": tell_array,
    "lines, objects, object": tell_objects,
    "dialogues": tell_dialogues,
    "csv": tell_table,
    "text": lambda beginning: None if _looks_cut(beginning) else tell_text(beginning),
}
_LOOKS_CUT = re.compile(r'[\]},]|"\w+"\s*:|<사람>|<챗봇>|<<')  # a first line that is the middle of another shape


@contextmanager
def open_records(path: str | Path, options: ReadingOptions = DEFAULTS) -> Iterator[_Told]:
    """The format of a file or dataset, and its records as they are read: the line that each begins in, and its fields.

    Raises `UserError` as `read_records` does: what can be told from the beginning at once, the rest when it is met.
    """
    file = str(path)
    if is_dataset(file):
        yield FileFormat("dataset"), read_dataset(file)
        return
    with open_file(file) as opened:
        yield (None if options.plain_text else _binary(file, opened)) or _text(file, opened, options)


def _binary(file: str, opened: Opened) -> _Told | None:
    magic = opened.magic
    if magic == _OLD_EXCEL:
        raise UserError(f"{file}: is an old Excel file, or one with a password. Save it as .xlsx or .csv")
    for shape, (starts, is_it, read) in BINARY.items():
        if magic.startswith(starts):
            stream = opened.stream
            if not stream.seekable():  # a pipe: these formats have their tables at the end
                stream = io.BufferedReader(io.BytesIO(stream.read()))
            if is_it(file, stream):
                return FileFormat(shape), read(file, stream)
    return None


def _text(file: str, opened: Opened, options: ReadingOptions) -> _Told:
    told, records = tell(Beginning(file, decoded(file, opened.stream, options.encoding), options))
    return replace(told, gzip=opened.packed == "gzip", zstd=opened.packed == "zstd"), records


def tell(beginning: Beginning) -> _Told:
    """The format of a text file and its records. Raises `UserError` if it is the middle of something."""
    start, number = beginning.start, beginning.number
    if "\r" in start and not beginning.first.endswith("\n"):
        where = f"{beginning.file}, line {number}"
        raise UserError(f"{where}: ends of CR alone, expected LF or CRLF. Convert it: tr '\\r' '\\n'")
    for told in (tell_it(beginning) for tell_it in TEXT.values()):
        if told:
            return told
    raise UserError(
        f"{beginning.file}, line {number}: found {start[:40]!r}, expected a JSON array ('['), JSON lines ('{{'), "
        f"dialogues ('{DIALOGUE_START}'), CSV with a header such as Q,A,label, or a prompt a line: name a file of "
        "prompts .txt, or say so by `plain_text: true` in a config, `--plain-text` in a command"
    )


def _looks_cut(beginning: Beginning) -> bool:
    return "\0" in beginning.start or (not beginning.name.endswith(".txt") and bool(_LOOKS_CUT.match(beginning.start)))
