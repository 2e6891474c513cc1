"""The first sheet of an .xlsx file → records, a row each; and what other zip files are told."""

import logging
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from kochat_trl.data.formats.beginning import Located
from kochat_trl.data.formats.tables import Header
from kochat_trl.errors import UserError

logger = logging.getLogger(__name__)

_ESCAPED = re.compile("_x([0-9A-Fa-f]{4})_")  # a character that XML can't hold


def is_workbook(file: str, stream: BinaryIO) -> bool:
    """Whether a zip file is an .xlsx file. Raises `UserError` if it is none: there is nothing that reads it."""
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(f"{file}: is no whole zip or .xlsx file, or a broken one: {str(error)[:200]}") from None
    finally:
        stream.seek(0)
    if any(name.startswith("xl/") for name in names):
        return True
    inside = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])[:200]
    raise UserError(f"{file}: is a zip file, which isn't read. Unpack it, and name the files in it: {inside}")


def read_sheet(file: str, stream: BinaryIO) -> Iterator[Located]:
    """The rows of the first sheet under its first row, as texts; the line of a record is its row in the sheet.

    Rows without text are left out. Raises `UserError`, with the file's name, if it is broken, or without a header.
    """
    import openpyxl

    header: Header | None = None
    try:
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        sheet, *others = book.worksheets
        if others:
            names = ", ".join(repr(other.title) for other in others)
            logger.info("%s: the sheet %r is read, not %s", file, sheet.title, names)
        sheet.reset_dimensions()  # some programs write wrong ones
        for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
            row = [_text(cell) for cell in cells]
            while row and not row[-1].strip() and len(row) > (header.width if header else 0):
                row.pop()
            if not any(map(str.strip, row)):
                continue
            if header:
                yield number, header.fields(row + [""] * (header.width - len(row)))
            else:
                header = Header(file, number, row)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever zipfile, the parser of XML, and openpyxl raise
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        shown = "".join(c if c.isprintable() else "\ufffd" for c in reason)
        raise UserError(f"{file}: is no whole .xlsx file, or a broken one: {shown}") from None
    if header is None:
        raise UserError(f"{file}: its first sheet is empty")


def _text(cell: Any) -> str:
    """The value of a cell as a text, whole numbers without a point."""
    if isinstance(cell, str):
        return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), cell) if "_x" in cell else cell
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell)
