"""Records → Parquet, Arrow and .xlsx; what these can't hold is refused, not changed."""

import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from kochat_trl.data.formats.columnar import rows, without_nulls
from kochat_trl.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_CELL = 32_767  # characters; Excel holds no more
# What XML can't hold, and what would be taken for the escape of such a character.
_ESCAPED = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")


def write_parquet(stream: BinaryIO, records: Iterable[dict[str, Any]]) -> None:
    """Write records as a Parquet file. Raises `UserError` if the values of a field aren't of one type."""
    import pyarrow.parquet as pq

    table = _table(records, "a Parquet file")
    try:
        pq.write_table(table, stream, row_group_size=10_000)
    except (ValueError, NotImplementedError) as error:  # a struct without fields
        raise UserError(f"a Parquet file can't hold these records: {str(error)[:200]}") from None


def write_arrow(stream: BinaryIO, records: Iterable[dict[str, Any]]) -> None:
    """Write records as an Arrow file. Raises as `write_parquet` does."""
    import pyarrow as pa

    table = _table(records, "an Arrow file")
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def _table(records: Iterable[dict[str, Any]], what: str) -> Any:
    import pyarrow as pa

    kept = list(records)
    names = list(dict.fromkeys(name for fields in kept for name in fields))
    if not names:
        raise UserError(f"{what} can't hold records without fields")
    columns = []
    for name in names:
        try:
            columns.append(pa.array([fields.get(name) for fields in kept]))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"{what} holds values of one type in a column, those of {name!r} differ: {reason}"
            ) from None
    table = pa.table(columns, names=names)
    for i, (fields, back) in enumerate(zip(kept, rows(what, table), strict=True)):
        if without_nulls(back) != (said := without_nulls(fields)):
            differ = [name for name in said if back[name] != said[name]]
            raise UserError(f"record {i}: {what} can't hold the fields {reprlib.repr(differ)} as they are")
    return table


def write_sheet(stream: BinaryIO, records: Iterable[dict[str, Any]]) -> None:
    """Write records as an .xlsx file of one sheet, a row each under a header.

    Raises `UserError` for other than texts, for a text of over 32,767 characters, for a record that has none, and
    where fields differ between records.
    """
    import openpyxl
    from openpyxl.cell import WriteOnlyCell

    table = list(_texts(records))  # all is checked before: openpyxl can't stop halfway
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("data")
    for row in table:
        cells = [WriteOnlyCell(sheet, text) for text in row]
        for cell in cells:
            cell.data_type = "s"  # and no formula, if it begins with `=`
        sheet.append(cells)
    book.save(stream)


def _texts(records: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """The header and the rows of a sheet, as XML can hold them."""
    header: list[str] = []
    for i, fields in enumerate(records):
        if not header:
            header = list(fields)
            yield header
        if set(fields) != set(header):
            raise UserError(f"record {i} has other fields than the first, and a sheet has one header")
        texts = [fields[name] for name in header]
        if not all(isinstance(text, str) and len(text) <= _LONGEST_CELL for text in texts):
            raise UserError(f"record {i}: a sheet holds texts of up to {_LONGEST_CELL:,} characters, and nothing else")
        if not any(map(str.strip, texts)):
            raise UserError(f"record {i} has no text, and a row without text is no record in a sheet")
        if any(map(_SURROGATE.search, texts)):
            raise UserError(f"record {i}: half a character in a text; only JSON can tell it")
        yield [_ESCAPED.sub(lambda match: f"_x{ord(match[0]):04X}_", text) for text in texts]
