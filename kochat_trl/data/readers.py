"""Files → raw records, with their file, line and index.

What a file is, is told from what is in it, seldom from its name: KoChatGPT's `.jsonl` files are JSON arrays, and one of
them is not JSON at all. `formats.py` has the table of formats. Files are read as a stream, so what they take in memory
doesn't grow with the number of records, unless these are all in one line, or in one object.
"""

import logging
import reprlib
from collections.abc import Iterator
from pathlib import Path

from kochat_trl.data.formats.beginning import FileFormat, FileShape
from kochat_trl.data.formats.formats import open_records
from kochat_trl.data.formats.hub import is_dataset
from kochat_trl.data.formats.plain import DIALOGUE_START, SPEAKERS
from kochat_trl.data.layout import Layout, RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.records import Source
from kochat_trl.errors import UserError

logger = logging.getLogger(__name__)

__all__ = ["DIALOGUE_START", "SPEAKERS", "FileFormat", "FileShape", "file_format", "read_records"]


def read_records(path: str | Path, options: ReadingOptions = DEFAULTS) -> Iterator[RawRecord]:
    """Yield the records of a file or of a dataset, in order.

    A file is JSON (an array, objects in lines or one after the other, or one object that holds a list of them),
    KoChatGPT's dialogues, CSV or TSV with a header, plain text with a prompt a line, Parquet, Arrow, or .xlsx. Text is
    UTF-8 unless `options.encoding` says otherwise, with or without BOM, CRLF or LF; packed by gzip or zstd or not. A
    dataset is `owner/name` on the Hub or a folder of that layout, with `/subset` and `:split` (`train` unless given).

    A JSON line or a row of a table that is broken by itself is yielded as `Unreadable`, since the ones after it can be
    read. Raises `UserError`, with the line where there are lines, if the file is missing or broken for good.
    """
    file = str(path)
    with open_records(file, options) as (found, records):
        layout = Layout(options, found.holder, found.wrapper)
        if found.holder is not None:
            rest = {name: value for name, value in found.wrapper.items() if name != found.holder}
            beside = f"; beside them it says {reprlib.repr(rest)}, which isn't read" if rest else ""
            logger.info("%s: the records are the items of %r%s", file, found.holder, beside)
        for index, (line, fields) in enumerate(records):
            yield RawRecord(Source(file, index, line), fields, layout)


def file_format(path: str | Path, options: ReadingOptions = DEFAULTS) -> FileFormat:
    """The format of the file, told from its beginning. Raises as `read_records` does."""
    file = str(path)
    if not is_dataset(file) and Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{file}: is a pipe, which can be read only once; save it to a file first")
    with open_records(file, options) as (found, _):
        return found
