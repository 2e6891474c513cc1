"""Texts that a careless reader trips over, and files of them: what the tests of readers and writers have in common."""

import gzip
import json
import tracemalloc
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, FileFormat, FileShape, read_records
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError

from hypothesis import settings
from hypothesis import strategies as st

FIXED = settings(max_examples=100, deadline=None, derandomize=True, database=None)  # the same examples in each run

# --- Texts that a careless reader trips over ----------------------------------------------------

NFD = unicodedata.normalize("NFD", "한국어")
PIECES = [
    *('"', '""', "'", "\\", "\\n", "\\u0000", '\\"', ",", ":", "[", "]", "{", "}", '", "completion": "', " ", "Q,A"),
    *("\0", "\x1a", "\x1b", "\x7f", "\t", "\r", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff"),
    *("\xa0", "\u3000", "\u200b", "\ufffd", "\uffff", "\U0001f600", "\U0010ffff", "가", NFD, "ㅋㅋ", DIALOGUE_START),
    *(f"{speaker}:" for speaker in SPEAKERS),
    *(f"가\n {begins_turn}" for begins_turn in (DIALOGUE_START, "<사람>:")),
]
HALVES = ["\ud800", "\udbff", "\udc00", "\udfff", "\ude00가"]  # lone surrogates: only JSON's escapes can tell them


def texts_of(pieces: list[str], forbidden: str = "") -> st.SearchStrategy[str]:
    anything = st.characters(exclude_categories=["Cs"], exclude_characters=forbidden)
    pieces = [piece for piece in pieces if not set(piece) & set(forbidden)]
    return st.lists(st.sampled_from(pieces) | st.text(anything, max_size=4), max_size=6).map("".join)


TEXTS = texts_of(PIECES)
# Two escaped halves in a row are one character, in any JSON; the round trip through `json` makes them so.
JSON_TEXTS = texts_of(PIECES + HALVES).map(lambda text: json.loads(json.dumps(text)))
JSON_VALUES = st.recursive(
    JSON_TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_TEXTS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from(["prompt", "completion", "ranking"]) | JSON_TEXTS, JSON_VALUES, max_size=4)
# An array is told from a prompt that begins with '[' by what follows in the line; here that is an object.
ARRAYS = st.builds(lambda first, rest: [first, *rest], FIELDS, st.lists(FIELDS | JSON_VALUES, max_size=4)) | st.just([])


def stands_alone(fields: dict) -> bool:
    """Whether an object is read as a record in a file of its own, whatever its names: none of its values is a list of
    objects, which would be the records."""
    lists = [value for value in fields.values() if value and isinstance(value, list)]
    return not any(all(isinstance(item, dict) for item in value) for value in lists)


LINES = st.lists(FIELDS, min_size=1, max_size=5).filter(lambda records: len(records) > 1 or stands_alone(records[0]))
BLANKS = st.lists(st.sampled_from([" ", "\t", "\n", "\r\n"]), max_size=4).map("".join)

# --- Files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the text of a file is laid out in bytes."""

    bom: bool
    crlf: bool
    gzip: bool

    def write(self, path: Path, text: str) -> Path:
        text = text.replace("\n", "\r\n") if self.crlf else text
        data = text.encode("utf-8-sig" if self.bom else "utf-8")
        path.write_bytes(gzip.compress(data, 1) if self.gzip else data)
        return path


LAYOUTS = st.builds(Layout, st.booleans(), st.booleans(), st.booleans())
LF_LAYOUTS = st.builds(Layout, st.booleans(), st.just(False), st.booleans())  # where a CR would be part of a text
PLAIN = Layout(bom=False, crlf=False, gzip=False)


def written(path: Path, form: FileFormat | FileShape, records: list) -> str:
    """The text of the file that `write_records` makes of `records`."""
    return written_bytes(path, form, records).decode()


def written_bytes(path: Path, form: FileFormat | FileShape, records: list) -> bytes:
    """What `write_records` makes of `records`."""
    path.unlink(missing_ok=True)
    assert write_records(path, form, records) == len(records)
    return path.read_bytes()


def fields_read(path: Path | str, options: ReadingOptions = DEFAULTS) -> list:
    """The fields of all records, after a check of what each says about where it comes from."""
    records = list(read_records(path, options))
    assert [record.source.index for record in records] == list(range(len(records)))
    assert {record.source.file for record in records} <= {str(path)}
    return [record.fields for record in records]


def until_error(path: Path | str, options: ReadingOptions = DEFAULTS) -> tuple[list, str]:
    """The fields of the records before the error in which reading the file must end, and its message."""
    fields = []
    try:
        for record in read_records(path, options):
            fields.append(record.fields)
    except UserError as error:
        return fields, str(error)
    raise AssertionError("read to the end")


def lines_read(path: Path) -> list[int]:
    return [record.source.line for record in read_records(path)]


def line_after(text: str) -> int:
    return text.count("\n") + 1


def dialogue(*turns: tuple[str, str]) -> dict:
    """The fields of a dialogue: (speaker, text) for each turn."""
    return {"messages": [{"role": speaker, "content": text} for speaker, text in turns]}


def peak_of_reading(path: Path) -> int:
    tracemalloc.start()
    for _ in read_records(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
