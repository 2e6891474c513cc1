"""Tables → records: rows under a header, which names fields in any language. CSV and TSV; sheets use its `Header`."""

import csv
import re
import reprlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.formats.beginning import Beginning, FileFormat, Located
from kochat_trl.data.records import Unreadable, in_columns, in_map
from kochat_trl.errors import UserError

_LOOKED_AT = 20  # lines, to tell a table whose header isn't known
_DELIMITERS = ",\t;|"
_SHORT_NAME = re.compile(r"[\w .\-()\[\]]{0,40}")
_UNNAMED = "Unnamed: 0"  # pandas' name for an index without one
_SHOWN = reprlib.Repr()
_SHOWN.maxlist, _SHOWN.maxstring = 12, 30
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


class Header:
    """The names of a table's columns, without those of an index, which is left out.

    Raises `UserError`, with the line, if a name is empty, or there twice, or none is left, or by `expected`.
    """

    def __init__(
        self, file: str, line: int, cells: list[str], expected: Callable[[list[str]], bool] = lambda cells: True
    ):
        cells = [cell.strip() for cell in cells]
        self.width = len(cells)
        self._index = {i for i, cell in enumerate(cells) if cell == _UNNAMED or (not cell and i == 0)}
        self.names = [cell for i, cell in enumerate(cells) if i not in self._index]
        named = all(self.names) and not any(map(_CONTROL.search, self.names))
        if not named or not self.names or not expected(cells) or len(set(self.names)) < len(self.names):
            found = f"found the header {reprlib.repr(cells)}"
            raise UserError(f"{file}, line {line}: {found}, expected names of fields, none empty and none twice")

    def fields(self, row: list[str]) -> Any:
        """The cells of a row by their names; `Unreadable` if there are too few or too many."""
        if len(row) != self.width:
            return Unreadable(f"{len(row)} cells", f"{self.width} cells: {','.join(self.names)[:80]}")
        if self._index:
            row = [cell for i, cell in enumerate(row) if i not in self._index]
        return dict(zip(self.names, row, strict=True))


def tell_table(beginning: Beginning) -> tuple[FileFormat, Iterator[Located]] | None:
    """A file named .csv or .tsv, or one whose first line has names of fields, of which one is known.

    In a file named .txt it has two names at least. Raises `UserError` if the first lines are a table, and none of its
    names is known; not in a .txt file, which is prompts then.
    """
    named = beginning.name.endswith((".csv", ".tsv"))
    known = [mark for mark in _DELIMITERS if _is_header(beginning, _cells(beginning.start, mark))]
    tabs = beginning.name.endswith(".tsv") or ("\t" in beginning.start and "," not in beginning.start)
    delimiter = "\t" if tabs else (known or [","])[0]
    if not named and not known:
        _refuse_unknown(beginning)
        return None
    told = beginning.told("csv", delimiter=delimiter)
    expected = (lambda cells: True) if named else partial(_is_header, beginning)
    return told, _read_table(beginning.file, beginning.lines(), delimiter, expected)


def _cells(line: str, delimiter: str) -> list[str]:
    """Roughly: a quote may go on in the next line."""
    return [cell.strip() for cell in line.replace('"', "").split(delimiter)]


def _is_header(beginning: Beginning, cells: list[str]) -> bool:
    if not beginning.options.columns.keys().isdisjoint(cells):
        return True
    if beginning.name.endswith(".txt") and len(cells) < 2:
        return False  # a prompt such as "질문"
    names = [cell for cell in cells if cell != _UNNAMED]
    return all(map(_SHORT_NAME.fullmatch, names)) and shapes.knows(names)


def _refuse_unknown(beginning: Beginning) -> None:
    """Raise `UserError` if the first lines have the same number of cells: two at least; where a comma may be one
    of prose, with a blank after it, three."""
    lines = beginning.filled(_LOOKED_AT)
    if len(lines) < 2 or beginning.name.endswith(".txt"):
        return
    by_tabs = [line.rstrip("\r\n").split("\t") for line in lines]
    rows = by_tabs if len(by_tabs[0]) > 1 else _rows_by_commas(lines)
    prose = rows is not by_tabs and any(cell.startswith(" ") for row in rows for cell in row[1:])
    if len({len(row) for row in rows}) == 1 and len(rows) > 1 and len(rows[0]) >= (3 if prose else 2):
        first = [cell.strip() for cell in rows[0]]
        column = next((cell for cell in first if cell and cell.isprintable()), "COLUMN")[:20]
        raise UserError(
            f"{beginning.file}, line {beginning.number}: a table of {len(first)} columns, none with a known name: "
            f"{_SHOWN.repr(first)}. Name the file .{'tsv' if rows is by_tabs else 'csv'} and say what its columns "
            f"are: {in_columns({column: 'prompt'})} in a config, {in_map({column: 'prompt'})} in a command. "
            "Or read it as prompts, one a line: `plain_text: true`, `--plain-text`"
        )


def _rows_by_commas(lines: list[str]) -> list[list[str]]:
    """The rows of strict CSV; none if it isn't that."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(lines, strict=True):
            rows.append(row)
    except csv.Error as error:
        # The last of the lines that were looked at may end in a cell.
        return rows if "unexpected end" in str(error) and len(lines) == _LOOKED_AT else []
    return rows


def _read_table(
    file: str, lines: Iterator[str], delimiter: str, expected: Callable[[list[str]], bool]
) -> Iterator[Located]:
    """The rows under the first row with text; `expected` says whether its cells are what the file was told by."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: Header | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            reason = str(error).replace("\t", "\\t")
            if "unexpected end" in reason:
                raise UserError(f"{file}, line {number}: a quote is opened here and not closed") from None
            if "field limit" in reason:
                found = f"a cell of over {csv.field_size_limit():,} characters"
                raise UserError(f"{file}, line {number}: {found}; is a quote opened and not closed?") from None
            if not header:
                raise UserError(f"{file}, line {number}: broken CSV: {reason}") from None
            yield number, Unreadable(f"broken CSV: {reason}", f"{header.width} cells")
            continue
        if row is None:
            return
        if not row or not (header or "".join(row).strip()):
            continue
        if header:
            yield number, header.fields(row)
        else:
            header = Header(file, number, row, expected)
