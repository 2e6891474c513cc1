"""JSON → records: an array, a record a line, objects one after the other, or the list that one object holds."""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, Literal, NoReturn

from kochat_trl.data import shapes
from kochat_trl.data.formats.beginning import Beginning, FileFormat, Located
from kochat_trl.data.records import Unreadable, in_columns, in_map
from kochat_trl.errors import UserError

_ARRAY = re.compile(r"""\[\s*(?:$|[\[\]{}"'\d,-])""")  # and not a prompt such as "[긴급] 도와줘"
_BLANK = re.compile(r"[ \t\r\n]*")
_BLANKS = " \t\r\n"
_LINES_AT_ONCE = 256  # lines of an array that are parsed together
_Told = tuple[FileFormat, Iterator[Located]]

# --- Values -------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"field {reprlib.repr(name)} is there twice")
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {reprlib.repr(number)} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_json, parse_float=_finite)
_LENIENT = json.JSONDecoder()  # for what is only to be told, not read


def _explain(error: ValueError | RecursionError) -> str:
    """What is wrong with a piece of JSON. Not every error is a JSONDecodeError: a number of 5,000 digits isn't."""
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


class _Window:
    """The stretch of a file's text that is being parsed, and the line of the file that `position` is in.

    `begun` is where the value that was parsed last begins in `text`.
    """

    def __init__(self, lines: Iterable[str], line: int = 1):
        self._lines = iter(lines)
        self.text, self.position, self.line, self.begun = "", 0, line, 0

    def fill(self, count: int) -> bool:
        """Drop what is before `position` and read `count` more lines; False at the end of the file."""
        more = "".join(islice(self._lines, count))
        if more:
            self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def move(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skip blanks; the character that follows, empty at the end of the file."""
        while True:
            position = _BLANK.match(self.text, self.position).end()  # type: ignore[union-attr]
            if position > self.position:
                self.move(position)
            if position < len(self.text):
                return self.text[position]
            if not self.fill(_LINES_AT_ONCE):
                return ""

    def ahead(self, count: int) -> str:
        return self.text[self.position : self.position + count]

    def skip(self) -> None:
        """Move behind the character here, which is no end of a line."""
        self.position += 1

    def value(self) -> Any:
        """Parse the JSON value here and move behind it. Raises `ValueError` or `RecursionError`."""
        count = _LINES_AT_ONCE
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                self.begun = self.position
                self.move(end)
                return value
            except json.JSONDecodeError as error:
                # No JSON token goes over a line's end, so text that was cut there fails at its end, if at all.
                if self.text[error.pos :].strip(" \t\r\n,") or not self.fill(count):
                    raise
                count *= 2  # a record of a great many lines takes linear time

    def record(self, file: str, index: int) -> Any:
        """`value`, or a `UserError` that names the line of the fault."""
        line = self.line
        try:
            return self.value()
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line += self.text.count("\n", self.position, error.pos)
            raise UserError(f"{file}, line {line} (record {index}): {_explain(error)}") from None


# --- Arrays and lines ---------------------------------------------------------------------------


def tell_array(beginning: Beginning) -> _Told | None:
    if not _ARRAY.match(beginning.start):
        return None
    return beginning.told("array"), _read_array(beginning.file, beginning.lines())


def _read_array(file: str, lines: Iterator[str]) -> Iterator[Located]:
    window = _Window(lines)
    if window.next_character() != "[":  # but a blank that JSON doesn't know
        raise UserError(f"{file}, line {window.line}: found {window.ahead(20)!r}, expected '['")
    yield from _items(file, window)
    if window.next_character():
        where = f"{file}, line {window.line}"
        raise UserError(f"{where}: found {window.ahead(40)!r} after the JSON array, expected nothing")


def _items(file: str, window: _Window) -> Iterator[Located]:
    """The items of the array that begins here, with their lines; then the window is behind it."""
    window.skip()
    for index in count():
        if window.next_character() == "]" and index == 0:
            break
        line = window.line
        yield line, window.record(file, index)
        if window.next_character() == "]":
            break
        if window.next_character() != ",":
            where = f"{file}, line {window.line}"
            raise UserError(f"{where}: found {window.ahead(20)!r}, expected ',' or ']' after record {index}")
        window.skip()
    window.skip()


def _read_lines(lines: Iterator[str]) -> Iterator[Located]:
    for number, line in enumerate(lines, start=1):
        if line.strip(_BLANKS):
            try:
                fields: Any = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                fields = Unreadable(_explain(error), "a JSON object in one line")
            yield number, fields


# --- Objects: one a line, one after the other, or one that holds the records --------------------


def tell_objects(beginning: Beginning) -> _Told | None:
    """A file that begins with `{`, told by its first lines.

    - The first is a whole object: JSON lines; unless another `{` follows in that line.
    - It ends where JSON goes on, and the next isn't a whole object: objects one after the other, in any layout.
    - Otherwise it is a broken line of JSON lines, a record like any.

    A file of exactly one object may hold the records in one of its fields (`_holder`). To know that, it is parsed as a
    whole, and then again to find the lines of its records; these are not read as a stream.
    """
    if not beginning.start.startswith("{"):
        return None
    layout = _layout(beginning)
    if layout == "lines":
        return beginning.told("lines"), _read_lines(beginning.lines())
    window = _Window(beginning.lines())
    window.next_character()
    line = window.line
    first = window.record(beginning.file, 0)
    text = window.text[window.begun : window.position]
    if window.next_character():
        return beginning.told("objects"), _read_objects(beginning.file, window, line, first)
    holder = _holder(beginning, line, first)
    if holder is None:
        return beginning.told("lines" if layout == "one line" else "objects"), iter([(line, first)])
    wrapper = first | {holder: []}
    told = beginning.told("object", holder=holder, wrapper=wrapper)
    return told, _read_held(beginning.file, _Window([text], line), holder)


def _layout(beginning: Beginning) -> Literal["lines", "one line", "objects"]:
    line = beginning.first.strip(_BLANKS)
    try:
        _, end = _LENIENT.raw_decode(line)
    except json.JSONDecodeError as error:
        if line[error.pos :].strip(" \t,"):
            return "lines"
        after = beginning.filled(3)[1:]
        # `]` can't begin a record, so what is between it and the first line is the one item of a list.
        in_lines = not after or (_is_object(after[0]) and not after[-1].lstrip(_BLANKS).startswith(("]", "}", ",")))
        return "lines" if in_lines else "objects"
    except (ValueError, RecursionError):
        return "lines"
    if line[end:].lstrip(_BLANKS).startswith("{"):
        return "objects"
    alone = len(beginning.filled(2)) == 1 and _is_object(line, _DECODER)  # if it isn't, it is a broken record
    return "one line" if alone else "lines"


def _is_object(line: str, decoder: json.JSONDecoder = _LENIENT) -> bool:
    try:
        return isinstance(decoder.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_objects(file: str, window: _Window, line: int, first: Any) -> Iterator[Located]:
    """Objects from the second on, which begins here."""
    yield line, first
    for index in count(1):
        if not (begins := window.next_character()):
            return
        if begins != "{":
            where = f"{file}, line {window.line}"
            raise UserError(f"{where}: found {window.ahead(20)!r}, expected '{{' or the end after record {index - 1}")
        line = window.line
        yield line, window.record(file, index)


def _holder(beginning: Beginning, line: int, wrapper: Mapping[str, Any]) -> str | None:
    """The field of the one object of a file whose items are the records; None if the object is a record itself.

    `columns` chooses one by a path such as `train[].question`. Otherwise it is the only field that is a list of
    objects, in an object of which no field is something that is read.
    """
    if shapes.knows(wrapper):
        return None
    columns = {path: role for path, role in beginning.options.columns.items() if role != "ignore"}
    chosen = [
        name
        for name, value in wrapper.items()
        if isinstance(value, list) and name not in columns
        if any(path.startswith(f"{name}[]") for path in columns)
    ]
    if len(chosen) == 1:
        return chosen[0]
    mapped = any(path == name or path.startswith((f"{name}.", f"{name}[]")) for path in columns for name in wrapper)
    if mapped and not chosen:
        return None
    lists = [name for name, value in wrapper.items() if value and isinstance(value, list) and _all_objects(value)]
    if len(lists) < 2:
        return next(iter(lists), None)
    name = next((name for name in lists if name and len(name) < 40 and name.isprintable()), "NAME")
    column = {f"{name}[].question": "prompt"}
    raise UserError(
        f"{beginning.file}, line {line}: one object with several lists of records: {reprlib.repr(lists)}. A path of "
        f"`columns:` or `--map` chooses one: {in_columns(column)} in a config, {in_map(column)} in a command"
    )


def _all_objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _read_held(file: str, window: _Window, holder: str) -> Iterator[Located]:
    """The items of the field `holder` of the object here, which is known to be JSON."""
    window.next_character()
    window.skip()
    while True:
        window.next_character()
        name = window.record(file, 0)
        window.next_character()
        window.skip()
        window.next_character()
        if name == holder:
            yield from _items(file, window)
            return
        window.record(file, 0)
        window.next_character()
        window.skip()
