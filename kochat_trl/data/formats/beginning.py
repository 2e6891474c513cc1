"""What a file is told by: its first lines, read as far as was needed; and what it was told to be."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from kochat_trl.data.formats.lines import name_inside
from kochat_trl.data.options import ReadingOptions
from kochat_trl.errors import UserError

FileShape = Literal[
    "array", "lines", "objects", "object", "dialogues", "csv", "text", "parquet", "arrow", "xlsx", "dataset"
]  # fmt: skip
Located = tuple[int | None, Any]  # the line where a record begins, and its fields


@dataclass(frozen=True)
class FileFormat:
    """What a file was found to be.

    - `crlf` is about its first line; `gzip` and `zstd` say how it was packed.
    - `delimiter` is that between the cells of a table (`csv`): a comma, a tab, a semicolon or a bar.
    - `holder` names the field whose items are the records of an `object`; `wrapper` has all its fields in their order,
      with an empty list under `holder`.
    - `options` is what it was read with: another file of the format is, too.
    """

    shape: FileShape
    bom: bool = False
    crlf: bool = False
    gzip: bool = False
    zstd: bool = False
    delimiter: str = ","
    holder: str | None = None
    wrapper: dict[str, Any] = field(default_factory=dict, hash=False)
    options: ReadingOptions = field(default_factory=ReadingOptions, compare=False)


class Beginning:
    """The lines of a text file, and those of them that were read to tell what it is.

    `head` has these, without a BOM; `start` is the text of the first line that has any, which is line `number`.
    """

    def __init__(self, file: str, lines: Iterator[str], options: ReadingOptions):
        self.file, self.options, self.name = file, options, name_inside(file)
        self._rest = lines
        first = next(lines, "")
        self.bom, self.head = first.startswith("\ufeff"), [first.lstrip("\ufeff")]
        while not self.head[-1].strip() and (line := next(lines, "")):
            self.head.append(line)
        self.number = len(self.head)
        self.start = self.head[-1].strip().lstrip("\ufeff")
        if not self.start:
            raise UserError(f"{file}: is empty")

    @property
    def first(self) -> str:
        """The first line with text, with its end."""
        return self.head[self.number - 1]

    def filled(self, count: int) -> list[str]:
        """The first `count` lines with text, fewer where the file ends before."""
        found = [line for line in self.head[self.number - 1 :] if line.strip(" \t\r\n")]
        while len(found) < count and (line := next(self._rest, "")):
            self.head.append(line)
            if line.strip(" \t\r\n"):
                found.append(line)
        return found[:count]

    def lines(self) -> Iterator[str]:
        """All lines, from the first one on; they can be read once."""
        return chain(self.head, self._rest)

    def told(self, shape: FileShape, **facts: Any) -> FileFormat:
        return FileFormat(shape, bom=self.bom, crlf=self.head[0].endswith("\r\n"), options=self.options, **facts)
