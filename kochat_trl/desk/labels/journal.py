"""Every judgement, on disk before the next item is shown: a file of JSON lines that is only ever appended to.

A line is a judgement, with all that was judged, or takes back its annotator's last one (`undo`). What stands is worked
out by reading the lines in order. So two journals of different annotators, one after the other, are a journal.
"""

import fcntl
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from kochat_trl.data.rankings import Tiers, ranking_tiers
from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.writers import to_json
from kochat_trl.errors import UserError
from kochat_trl.files import full_disk_told

Picked = Literal["order", "random", "uncertain", "overlap", "talk"]
_LINE_STARTS = (b'{"item": "', b'{"undo": "')


@dataclass(frozen=True)
class Judgement:
    """What an annotator says of an item.

    `verdict` is tiers of indices of the item's answers, best first, every answer in one; or that all are bad; or that
    the annotator leaves it to others. `shown` are the indices as they stood on the screen; `seconds` it took;
    `picked` is how the queue chose the item; "talk" if the annotator asked the question.
    """

    item: Item
    verdict: Tiers | Literal["all_bad", "skip"]
    annotator: str
    judged_at: str  # UTC, ISO 8601
    seconds: float
    shown: tuple[int, ...]
    picked: Picked
    note: str = ""

    @property
    def tiers(self) -> Tiers | None:
        """The order of the answers, if the annotator gave one."""
        return None if isinstance(self.verdict, str) else self.verdict

    @property
    def fields(self) -> dict[str, Any]:
        """As its line has it; an empty system message, history or note is left out."""
        asked: dict[str, Any] = self.item.prompt._asdict()
        verdict = {"answers": self.item.answers, "verdict": self.verdict, "annotator": self.annotator}
        how = {"judged_at": self.judged_at, "seconds": self.seconds, "shown": self.shown, "picked": self.picked}
        found = {"item": self.item.id} | asked | verdict | how | {"note": self.note}
        return {name: value for name, value in found.items() if value or name not in ("system", "history", "note")}


class Undo(NamedTuple):
    """`annotator` takes back the last judgement, which was of the item with this id."""

    item: str
    annotator: str
    judged_at: str

    @property
    def fields(self) -> dict[str, Any]:
        return {"undo": self.item, "annotator": self.annotator, "judged_at": self.judged_at}


class State:
    """What the lines of a journal come to."""

    def __init__(self) -> None:
        self._logs: dict[str, list[Judgement]] = {}  # by annotator, without what was taken back

    def check(self, line: Judgement | Undo) -> None:
        """Raise `ValueError`, with what was expected, if `line` takes back what its annotator didn't judge last."""
        last = self.last(line.annotator)
        if isinstance(line, Undo) and (last is None or last.item.id != line.item):
            was = f"{last.item.id}, which" if last else "nothing:"
            raise ValueError(f"field 'undo': found '{line.item}', expected {was} {line.annotator} judged last")

    def add(self, line: Judgement | Undo) -> None:
        """Take in the next line. Raises as `check` does."""
        self.check(line)
        log = self._logs.setdefault(line.annotator, [])
        if isinstance(line, Judgement):
            log.append(line)
        else:
            log.pop()

    def last(self, annotator: str) -> Judgement | None:
        """What an undo takes back."""
        log = self._logs.get(annotator)
        return log[-1] if log else None

    def by(self, annotator: str) -> dict[str, Judgement]:
        """The annotator's judgements that stand, by item: of each the last one. A skip is among them."""
        return {judgement.item.id: judgement for judgement in self._logs.get(annotator, ())}

    @property
    def annotators(self) -> list[str]:
        return list(self._logs)

    @property
    def standing(self) -> list[Judgement]:
        """All that stands, annotator by annotator."""
        return [judgement for annotator in self._logs for judgement in self.by(annotator).values()]


class Journal:
    """A journal that is open for writing, by this process alone.

    A second writer is refused (`flock`, which ends with the process, so a kill leaves no lock behind). Appending safely
    would not be enough: what the other one has judged since isn't known here, and would be shown and judged again.

    A line is written and synced to disk before `add` returns; where that fails, what was written of it is cut off. A
    kill in the middle of a write leaves a last line without its newline, which can be told when the file is next
    opened. If it is a whole judgement, it gets its newline and stands: its item isn't shown again, so nothing is judged
    twice. (No beginning of a JSON object is a JSON object.) Else it never was acknowledged: it is moved to `PATH.torn`,
    and its item is shown again.

    Raises `UserError` if the file can't be opened, is in use, or has a line that is none of a journal's; it is then
    left as it is.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with full_disk_told(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: can't be opened for writing: {error.strerror}") from None
        try:
            self._lock()
            self.state, torn = _fold(self.path)
            with full_disk_told(self.path.parent):
                self._mend(torn)
        except BaseException:
            self.close()
            raise

    def add(self, line: Judgement | Undo) -> None:
        """Put a line on disk, and then into `state`. Raises `UserError`, and leaves all as it was, if it is no line
        that could be read again, or if the disk is full."""
        text = to_json(line.fields)
        try:
            line = _line(json.loads(text))
            self.state.check(line)
        except ValueError as error:
            raise UserError(f"{self.path}: not written: {error}") from None
        self._append(f"{text}\n".encode())
        self.state.add(line)

    def undo(self, annotator: str) -> Judgement | None:
        """Take back what the annotator judged last, and return it; None if there is nothing."""
        last = self.state.last(annotator)
        if last:
            self.add(Undo(last.item.id, annotator, now()))
        return last

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is in use by another process; end that one, or write to a journal of your own: two "
                "journals, one after the other in one file, are read as one"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: can't be locked here ({error.strerror}); take a local folder") from None

    def _mend(self, torn: bytes) -> None:
        """Complete the last line, or move what there is of it to the file beside."""
        if not torn:
            _sync_folder(self.path.parent)  # the name of a new file, too
            return
        if _is_whole(torn):
            self._append(b"\n")
            return
        with Path(f"{self.path}.torn").open("ab") as beside:
            beside.write(torn + b"\n")
            beside.flush()
            os.fsync(beside.fileno())
        os.ftruncate(self._file, os.fstat(self._file).st_size - len(torn))
        os.fsync(self._file)

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            with full_disk_told(self.path.parent):
                while data:
                    data = data[os.write(self._file, data) :]
                os.fsync(self._file)
        except BaseException as error:
            os.ftruncate(self._file, size)
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: can't be written: {error.strerror}") from None
            raise


def is_name(text: str) -> bool:
    """Whether an annotator may be called so: visible characters, no blanks around them."""
    return bool(text) and text == text.strip() and text.isprintable()


def now() -> str:
    """The time as a journal has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_journal(path: str | Path) -> State:
    """What a journal comes to, also while another process writes it. Raises `UserError` if a line is broken."""
    return _fold(Path(path))[0]


def _fold(path: Path) -> tuple[State, bytes]:
    """The state after all whole lines, and the bytes after the last newline: a whole line is in the state, too."""
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    if torn and _is_whole(torn):
        lines.append(torn)
    elif torn and not lines and not any(torn.startswith(start[: len(torn)]) for start in _LINE_STARTS):
        raise UserError(f"{path} is no journal: it begins with {reprlib.repr(torn)}; name another file")
    state = State()
    for number, line in enumerate(lines, start=1):
        try:
            state.add(_line(json.loads(line.decode())))
        except (ValueError, RecursionError) as error:
            what = f"no JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
            raise UserError(
                f"{path}, line {number}: found {reprlib.repr(line.decode(errors='replace'))}, which is no line of a "
                f"journal: {what}. Mend the line, or move it to another file"
            ) from None
    return state, torn


def _is_whole(torn: bytes) -> bool:
    """Whether this is all of a line but its newline."""
    try:
        json.loads(torn.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _line(fields: Any) -> Judgement | Undo:
    """A line from its fields. Raises `ValueError`, with field, found and expected."""
    if not isinstance(fields, dict):
        raise ValueError("expected an object")
    if "undo" in fields:
        taken = _Fields(fields, "undo annotator judged_at")
        return Undo(taken.text("undo"), taken.name("annotator"), taken.time("judged_at"))
    taken = _Fields(
        fields, "item prompt answers verdict annotator judged_at seconds shown picked", "system history note"
    )
    history = taken.texts("history", 0) if "history" in fields else ()
    prompt = Prompt(taken.text("prompt"), taken.text("system") if "system" in fields else None, history)
    item = Item(prompt, taken.texts("answers", 2))
    count = len(item.answers)
    if len(set(item.answers)) < count:
        raise taken.error("answers", "answers that differ")
    if taken.text("item") != item.id:
        raise taken.error("item", f"{item.id}, the id of this prompt with these answers; was a text changed?")
    verdict: Any = fields["verdict"]
    if verdict not in ("all_bad", "skip"):
        try:
            verdict = ranking_tiers(verdict, count)
        except ValueError as error:
            raise taken.error("verdict", f"all_bad, skip, or tiers: {error}") from None
        if sum(map(len, verdict)) < count:
            raise taken.error("verdict", f"all {count} answers")
    shown = fields["shown"]
    if not isinstance(shown, list) or sorted(map(repr, shown)) != sorted(map(repr, range(count))):
        raise taken.error("shown", f"the indices from 0 to {count - 1} in some order")
    seconds = fields["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
        raise taken.error("seconds", "a number of seconds")
    if fields["picked"] not in get_args(Picked):
        raise taken.error("picked", f"one of {', '.join(get_args(Picked))}")
    about = (taken.name("annotator"), taken.time("judged_at"), float(seconds), tuple(shown))
    note = taken.text("note") if "note" in fields else ""
    return Judgement(item, verdict, *about, cast(Picked, fields["picked"]), note)


class _Fields:
    """The fields of a line, each of its type."""

    def __init__(self, fields: Mapping[str, Any], needs: str, may: str = ""):
        self.fields = fields
        for name in needs.split():
            if name not in fields:
                raise ValueError(f"field '{name}' is missing")
        if unknown := sorted(fields.keys() - {*needs.split(), *may.split()}):
            raise ValueError(f"field '{unknown[0]}' is unknown")

    def error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"field '{name}': found {reprlib.repr(self.fields[name])}, expected {expected}")

    def text(self, name: str) -> str:
        if not isinstance(value := self.fields[name], str) or not value:
            raise self.error(name, "a text")
        return value

    def texts(self, name: str, least: int) -> tuple[str, ...]:
        value = self.fields[name]
        if not isinstance(value, list) or len(value) < least or not all(isinstance(text, str) for text in value):
            raise self.error(name, f"a list of {least} texts or more" if least else "a list of texts")
        return tuple(value)

    def name(self, name: str) -> str:
        if not is_name(value := self.text(name)):
            raise self.error(name, "a name of visible characters")
        return value

    def time(self, name: str) -> str:
        value = self.text(name)
        try:
            offset = datetime.fromisoformat(value).utcoffset()
        except ValueError:
            offset = None
        if offset is None or offset.total_seconds():
            raise self.error(name, "a time in UTC, such as 2026-01-31T09:30:00+00:00")
        return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
