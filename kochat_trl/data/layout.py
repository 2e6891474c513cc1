"""How the records of one file are laid out: which field is what, by the tables of `shapes.py` and `columns:`."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.rankings import as_number
from kochat_trl.data.records import Described, RecordError, Source, Unreadable, clipped, in_columns, in_map
from kochat_trl.data.shapes import CANDIDATE, INSTANCE, NAMES, Role, Shape, role_of

logger = logging.getLogger(__name__)

Path = tuple[str, ...]  # names of fields, and "[]" for each item of a list


def shown(path: Path) -> str:
    """`path` as `columns:` has it: `a.b`, `a[].b`."""
    return ".".join(path).replace(".[]", "[]")


def help_for(*names: str) -> str:
    """What to do about fields that no row of the table has; of many the first few."""
    columns = {name: shapes.alike(name.rpartition(".")[2]) or "ROLE" for name in names[:6]}
    known = ", ".join(role for role in NAMES if role not in ("text", "instances"))
    return f"a field that is known: say what it is with {in_columns(columns)} ({in_map(columns)}): {known}"


@dataclass(frozen=True)
class Plan:
    """What the fields of a record are.

    `each` is a list whose items are an example each; paths into it begin with its name alone. `unknown` are fields that
    no row has: text there is refused. `inside` are fields of which `columns:` takes a part: the other texts in them are
    refused likewise. `repeats` are roles that may only say again what the others say. `problem` is a field and what was
    expected of it, where two fields claim one role.
    """

    paths: Mapping[Role, tuple[Path, ...]]
    shape: Shape | None
    each: str | None = None
    unknown: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    repeats: tuple[Role, ...] = ()
    problem: tuple[str, str] | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether nothing more than its parts has to be looked at."""
        return not (self.problem or self.unknown or self.inside) and self.shape is not None

    @cached_property
    def bare(self) -> str | None:
        """The field of a question that nothing else belongs to."""
        more = self.paths.keys() & {"context", "history", "system"}
        return self.plain.get("prompt") if self.asks == "prompt" and not more else None

    @cached_property
    def listed(self) -> str | None:
        """The field that has several answers in a list."""
        paths = self.paths.get("completions", ())
        return paths[0][0] if paths and len(paths[0]) == 1 and not self.numbered else None

    @cached_property
    def plain(self) -> dict[Role, str]:
        """The roles of one whole field each."""
        return {role: own[0][0] for role, own in self.paths.items() if len(own) == 1 and len(own[0]) == 1}

    @cached_property
    def numbered(self) -> tuple[str, ...]:
        """The fields that are an answer each."""
        paths = self.paths.get("completions", ())
        whole = all(len(path) == 1 for path in paths) and (len(paths) > 1 or any(shapes.number_of(p[0]) for p in paths))
        return tuple(path[0] for path in paths) if whole else ()

    @cached_property
    def first(self) -> int | None:
        """The number of the first of numbered answers; None where they have letters, or are a list."""
        number = shapes.number_of(self.numbered[0]) if self.numbered else None
        return int(number[1]) if number and number[1].isdigit() else None

    @cached_property
    def asks(self) -> Role | None:
        """The role of what stands before the answers; None where whole dialogues are compared."""
        roles = (role for role in ("messages", "text", "prompt") if role in self.paths and role not in self.repeats)
        return next(roles, None)

    def path(self, role: Role) -> Path | None:
        found = self.paths.get(role)
        return found[0] if found else None


@dataclass(frozen=True)
class MessageKeys:
    """Under which names a message has what."""

    speaker: str | None
    content: str | None
    others: tuple[str, ...]

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "MessageKeys":
        speakers, contents = (
            [name for name in names if shapes.plain(name) in shapes.MESSAGE[role].split()]
            for role in ("role", "content")
        )
        speaker, content = (own[0] if own else None for own in (speakers, contents))
        return cls(speaker, content, tuple(name for name in names if name not in (speaker, content)))


class Layout:
    """The layout of one file's records; `passed_over` are the columns that nothing reads, in the order met."""

    def __init__(self, options: ReadingOptions = DEFAULTS, holder: str | None = None, around: Iterable[str] = ()):
        """`holder` is the field whose items the records are, of an object that has those `around` it, too."""
        self.options = options
        self.passed_over: dict[str, None] = {}
        self.names: dict[str, None] = {}
        self.counts_from: dict[int, Source] = {}  # what rankings count from → the first that does
        self.unseen = set(options.columns) - set(around)
        self._prefix = "" if holder is None else f"{holder}[]."
        self._plans: dict[Any, Plan] = {}
        self._messages: dict[tuple[str, ...], MessageKeys] = {}

    def plan(self, fields: Mapping[str, Any]) -> Plan:
        """The plan of a record with these fields, none of them null."""
        key: Any = tuple(fields)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planned(fields)
        if plan.listed and isinstance(answers := fields[plan.listed], list) and answers:
            inner = {name: None for item in answers if isinstance(item, dict) for name in item}
            if shapes.knows_answer(inner):
                key = (key, tuple(inner))
                plan = self._plans.get(key) or self._plans.setdefault(key, self._planned(fields, inner))
        return plan

    def message_keys(self, names: tuple[str, ...]) -> "MessageKeys":
        """What the fields of a message are."""
        if names not in self._messages:
            self._messages[names] = MessageKeys.of(names)
        return self._messages[names]

    def ignores(self, path: Path) -> bool:
        """Whether `columns:` says that what is there is of no use."""
        name = shown(path)
        columns = {name, f"{self._prefix}{name}", name.split("[")[0]}
        return any(self.options.columns.get(column) == "ignore" for column in columns)

    def counts_otherwise(self, base: int, source: Source) -> Source | None:
        """The first record whose ranking counts from something else than this one's."""
        if base == 1 and 1 not in self.counts_from:
            logger.info("%s: rankings count from 1", source.file)
        self.counts_from.setdefault(base, source)
        return self.counts_from.get(1 - base)

    def pass_over(self, name: str) -> None:
        self.passed_over.setdefault(name)

    def _planned(self, fields: Mapping[str, Any], answer: Mapping[str, Any] | None = None) -> Plan:
        """The plan of `fields`; `answer` has the fields of one of several answers, where these are objects."""
        self.names |= dict.fromkeys(fields)
        paths, mapped, inside = self._by_columns(fields)
        unknown = self._by_names(fields, paths, mapped, inside)
        for own in paths.values():
            own.sort(key=lambda path: list(fields).index(path[0]))  # as the file has them, whatever the map's order
        if "prompt" not in paths and "messages" not in paths and (path := _an_input(paths)):
            paths["context"].remove(path)
            paths["prompt"] = [path]
        if answer is not None:
            (whole,) = paths.pop("completions")
            inside.setdefault(whole[0])
            for role, names in CANDIDATE.items():
                own = [(*whole, "[]", name) for name in answer if shapes.plain(name) in names.split()]
                paths.setdefault(role, []).extend(path for path in own if not self.ignores(path))
        each = None
        if "instances" in paths:
            each = paths["instances"][0][0]
            inside.setdefault(each)
            for role, name in INSTANCE.items():
                paths.setdefault(role, []).append((each, name))
        problem = _contested(paths) or _put_in_order(paths, mapped)
        found = {role: tuple(own) for role, own in paths.items() if own}
        if lists := [path for path in found.get("prompt", ()) if "[]" in path]:
            each = lists[0][0]
            found = {role: tuple(_within(each, path) for path in own) for role, own in found.items()}
        shape, repeats = _shape_of(frozenset(found) - ({"context", "completion"} if "instances" in found else set()))
        return Plan(found, shape, each, tuple(unknown), tuple(inside), repeats, problem)

    def _by_columns(self, fields: Mapping[str, Any]) -> tuple[dict[Role, list[Path]], dict[str, Role], dict[str, None]]:
        """What `columns:` says of `fields`: role → paths; field → role; and the fields of which it takes a part."""
        paths: dict[Role, list[Path]] = {}
        mapped: dict[str, Role] = {}
        inside: dict[str, None] = {}
        for column, target in self.options.columns.items():
            if (path := self._resolved(column, fields)) is None:
                continue
            role = target if target in NAMES else role_of(target)
            assert role is not None
            if len(path) > 1:
                inside.setdefault(path[0])
            if role != "ignore" or len(path) == 1:
                mapped[path[0]] = role
            if role != "ignore":
                paths.setdefault(role, []).append(path)
        return paths, mapped, inside

    def _by_names(
        self,
        fields: Mapping[str, Any],
        paths: dict[Role, list[Path]],
        mapped: Mapping[str, Role],
        inside: Mapping[str, None],
    ) -> list[str]:
        """Add what the names of the other fields say to `paths`, and return those that say nothing."""
        unknown = []
        for name in fields:
            role = mapped.get(name, self._role_of(name, fields))
            if role == "ignore" and name not in inside:
                self.pass_over(name)
            elif name in mapped or role == "ignore":
                continue
            elif role is not None:
                paths.setdefault(role, []).append((name,))
            elif name not in inside:
                unknown.append(name)
        return unknown

    def _role_of(self, name: str, fields: Mapping[str, Any]) -> Role | None:
        beside = shapes.NO_USE_BESIDE.get(shapes.plain(name))
        return "ignore" if beside and beside <= set(map(shapes.plain, fields)) else role_of(name)

    def _resolved(self, column: str, fields: Mapping[str, Any]) -> Path | None:
        """The path that `column` names in records with `fields`; None if they have no such field."""
        for name in (column, column.removeprefix(self._prefix)):
            path = (name,) if name in fields else tuple(name.replace("[]", ".[]").split("."))
            if path[0] in fields:
                return path
        return None

    def look_for_columns(self, fields: Mapping[str, Any]) -> None:
        """Take note of the columns of `columns:` that a record has."""
        for column in [*self.unseen]:
            path = self._resolved(column, fields)
            if path and leads(fields, path):
                self.unseen.discard(column)


def leads(value: Any, path: Path) -> bool:
    """Whether there is something at the end of `path`, in the first item of each list."""
    for step in path:
        if step == "[]" and isinstance(value, list) and value:
            value = value[0]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            return False
    return True


def value_at(value: Any, path: Path) -> Any:
    """What is at the end of `path`, a list where it has "[]"; None where there is nothing."""
    for i, step in enumerate(path):
        if step == "[]":
            return [value_at(item, path[i + 1 :]) for item in value] if isinstance(value, list) else None
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def texts_in(value: Any, path: Path) -> Iterator[Path]:
    """The paths of the texts in `value`; a blank is none, nor is a number."""
    waiting = [(value, path)]  # and no recursion: a value may be nested as deeply as a parser goes
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, str):
            if is_text(value):
                yield path
        elif isinstance(value, Mapping):
            waiting += [(inner, (*path, str(name))) for name, inner in reversed([*value.items()])]
        elif isinstance(value, list):
            waiting += [(item, (*path, "[]")) for item in reversed(value)]


def is_text(value: str) -> bool:
    """Whether a string says something: not a blank, nor a number."""
    return isinstance(as_number(value), str)


def _an_input(paths: Mapping[Role, list[Path]]) -> Path | None:
    """An `input` that no question stands before is the question."""
    inputs = [path for path in paths.get("context", ()) if shapes.plain(path[-1]) in ("input", "입력")]
    return inputs[0] if len(inputs) == 1 else None


def _within(each: str, path: Path) -> Path:
    return (each, *path[2:]) if path[:2] == (each, "[]") else path


def _contested(paths: Mapping[Role, list[Path]]) -> tuple[str, str] | None:
    """Two fields that are the same thing: which of them is meant can't be told."""
    for role, own in paths.items():
        if len(own) > 1 and role not in ("completions", "scores", "ranks"):
            names = " and ".join(f"'{clipped(shown(path))}'" for path in own[:6])
            last = shown(own[-1])
            return last, f"one {role}, and {names} could both be it: leave one out, {in_columns({last: 'ignore'})}"
    return None


def _put_in_order(paths: dict[Role, list[Path]], mapped: Mapping[str, Role]) -> tuple[str, str] | None:
    """Sort numbered fields, such as `completion_0`, by their numbers; what is wrong with these, if something is.

    What stands beside answers is sorted as these are.
    """
    problem = None
    for role in ("completions", "scores"):
        if own := [path for path in paths.get(role, ()) if path[0] not in mapped]:
            problem = problem or _by_number(paths[role], own)
    for role in ("scores", "ranks"):
        _put_beside(paths.get(role, []), paths.get("completions", []))
    return problem


def _by_number(paths: list[Path], own: list[Path]) -> tuple[str, str] | None:
    if len(paths) == 1:
        return None
    numbers = [shapes.number_of(path[-1]) if len(path) == 1 else None for path in paths]
    places: dict[Path, int] = {}
    for path, number in zip(paths, numbers, strict=True):
        if len(own) < len(paths) or number is None or number[0] != (numbers[0] or number)[0]:
            beside = clipped(shown(paths[0]))
            return shown(path), f"one list of answers, or numbered ones; there is '{beside}' beside it"
        places[path] = int(number[1]) if number[1].isdigit() else ord(number[1])
    paths.sort(key=places.__getitem__)
    first = places[paths[0]]
    if first not in (0, 1, ord("a")) or [places[path] for path in paths] != [*range(first, first + len(paths))]:
        return shown(paths[-1]), f"answers numbered without a gap; there are {', '.join(map(shown, paths[:9]))}"
    return None


_MARK = re.compile(r"\d+|(?<![a-z])[a-h](?![a-z\d])")


def _put_beside(paths: list[Path], answers: list[Path]) -> None:
    """Sort what is said of `answers` as these are, if both are told apart by the same numbers or letters."""
    marks, beside = ([[*_MARK.findall(shapes.plain(shown(path)))][-1:] for path in its] for its in (answers, paths))
    if len(answers) > 1 and all(marks.count(mark) == 1 for mark in marks) and sorted(marks) == sorted(beside):
        paths[:] = [paths[beside.index(mark)] for mark in marks]


def _shape_of(roles: frozenset[Role]) -> tuple[Shape | None, tuple[Role, ...]]:
    """The shape of a record, and the roles that can't but repeat the others in it."""
    for repeats in ((), ("text",), ("messages",), ("prompt",)):
        shape = shapes.shape_of_roles(roles - set(repeats)) if roles.issuperset(repeats) else None
        if shape and (not repeats or shape.kind != "prompt"):
            return shape, repeats
    return None, ()


@dataclass(slots=True)
class RawRecord:
    """The fields of a record as the file has them, before any check, and the layout of the file."""

    source: Source
    fields: Any
    layout: Layout = field(default_factory=Layout, compare=False, repr=False)

    def known_fields(self) -> dict[str, Any]:
        """The fields that aren't null. Raises `RecordError` if the record isn't made of fields at all."""
        fields = self.fields
        if not isinstance(fields, dict):
            found, expected = fields, "a JSON object"
            if isinstance(fields, Unreadable):
                found, expected = Described(fields.found), fields.expected
            raise RecordError(self.source, "(whole record)", found, expected)
        if None in fields.values():
            return {name: value for name, value in fields.items() if value is not None}
        return fields
