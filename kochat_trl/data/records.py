"""What a record of a data file is: where it came from, what can be wrong with it, and the types that stages take."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple

from kochat_trl.data.rankings import Pair, Pairs, Tiers, tier_pairs
from kochat_trl.errors import UserError

Fault = Literal["broken", "unclear", "empty", "equal", "tied", "unpaired", "overlong"]
MOST_SHOWN = 250  # characters of a value that an error message quotes
SHOWN = 3  # records named for each kind of fault in an error message

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = 8
_ROLES = ("user", "assistant")


@dataclass(slots=True, unsafe_hash=True)
class Source:
    """Where a record came from: `index` counts records from 0, `line` counts lines from 1 (None in a dataset)."""

    file: str
    index: int
    line: int | None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file}, record {self.index}"
        return f"{self.file}, line {self.line} (record {self.index})"


class RecordError(UserError):
    """One record that can't be used. `fault` says why in one word."""

    def __init__(self, source: Source, field: str, found: Any, expected: str, fault: Fault = "broken"):
        shown = found if isinstance(found, Described) else _SHORT.repr(found)
        shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
        expected = "".join(c if c.isprintable() else repr(c)[1:-1] for c in expected)  # names of fields are in it
        super().__init__(f"{source}: field '{clipped(field)}': found {shown}, expected {expected}")
        self.source, self.field, self.expected, self.fault = source, field, expected, fault


def clipped(name: str) -> str:
    """The name of a field for a message: what can't be seen is escaped, and a long one ends in dots."""
    short = _short(name)
    return short if short.isprintable() else repr(short)[1:-1]


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


_BARE = re.compile(r"[^\W\d_][\w.]*( [\w.]+)*")  # a name that needs no quotes, in YAML nor in a shell
_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # in YAML


def in_columns(columns: Mapping[str, str]) -> str:
    """What a config says to have these names read as these roles: `columns: {답변: completion}`."""
    pairs = []
    for name, role in ((_short(name), role) for name, role in columns.items()):
        bare = _BARE.fullmatch(name) and name.lower() not in _NO_TEXT
        pairs.append(f"{name if bare else json.dumps(name, ensure_ascii=False)}: {role}")
    return f"`columns: {{{', '.join(pairs)}}}`"


def in_map(columns: Mapping[str, str]) -> str:
    """The same as a flag: `--map 답변=completion`."""
    words = [f"{clipped(name)}={role}" for name, role in columns.items()]
    quoted = (word if _BARE.fullmatch(word.replace("=", "")) and " " not in word else f'"{word}"' for word in words)
    return f"`--map {' '.join(quoted)}`"


class Described(str):
    """Words about what was found, as against the thing itself: an error message gives them without quotes."""


class BrokenRecordsError(UserError):
    """Some records of the input can't be used, and the config says to refuse them."""

    def __init__(self, errors: Sequence[RecordError], total: int):
        remedy = (
            "Mend the file (`kochat data check` lists what is wrong, `kochat data clean` mends it), or leave these "
            "out and list them: `invalid_records: skip` in a config, `--invalid-records skip` in a command"
        )
        if any(error.fault == "overlong" for error in errors):
            remedy += ", for the long ones `overlong: drop` (or `truncate`), `--overlong drop`"
        super().__init__(f"{len(errors)} of {total} records can't be used:\n{summarize(errors)}\n{remedy}.")


def summarize(errors: Sequence[RecordError]) -> str:
    """For each kind of error: how many, and the first few of them."""
    kinds: dict[tuple[str, str, str], list[RecordError]] = {}
    for error in errors:
        kinds.setdefault((error.source.file, error.field, error.expected), []).append(error)
    lines = []
    for alike in kinds.values():
        lines += [f"  {error}" for error in alike[:SHOWN]]
        if len(alike) > SHOWN:
            lines.append(f"    ... and {len(alike) - SHOWN} more like these, {len(alike)} in all")
    return "\n".join(lines)


@dataclass(frozen=True)
class Unreadable:
    """Stands in for the fields of a record that doesn't follow its file's format; the records after it do."""

    found: str
    expected: str


Messages = Sequence[dict[str, str]]  # of a chat template: role and content


def conversation(*texts: str, system: str | None = None) -> Messages:
    """User, assistant, user, ... in turn, after a system message if there is one."""
    messages = [{"role": role, "content": text} for role, text in zip(cycle(_ROLES), texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


class Dialogue(NamedTuple):
    """One SFT example: texts of the user and the assistant in turn, the last one the assistant's."""

    texts: tuple[str, ...]
    system: str | None = None

    @property
    def messages(self) -> Messages:
        return conversation(*self.texts, system=self.system)


class Prompt(NamedTuple):
    """One PPO example: what the user asks, after `history`, texts of the user and the assistant in turn."""

    prompt: str
    system: str | None = None
    history: tuple[str, ...] = ()

    @property
    def messages(self) -> Messages:
        return conversation(*self.history, self.prompt, system=self.system)

    @property
    def fields(self) -> dict[str, Any]:
        """As a file has it: the messages where there are some before the question."""
        prompt = list(conversation(*self.history, self.prompt)) if self.history else self.prompt
        return {"prompt": prompt} | ({"system": self.system} if self.system else {})


class Ranking(NamedTuple):
    """One reward example: completions of a prompt, ranked by `tiers`, best first. A chosen/rejected pair is k = 2.

    `ranking` is KoChatGPT's, as the file has it but counted from 0; None where the order comes from something else.
    """

    prompt: str
    completions: tuple[str, ...]
    tiers: Tiers
    system: str | None = None
    history: tuple[str, ...] = ()
    ranking: Any = None

    @property
    def asked(self) -> Prompt:
        return Prompt(self.prompt, self.system, self.history)

    def messages(self, completion: int) -> Messages:
        """The prompt with one of its completions."""
        return conversation(*self.history, self.prompt, self.completions[completion], system=self.system)

    def pairs(self, pairs: Pairs = "all") -> list[Pair]:
        return tier_pairs(self.tiers, pairs)


class Labelled(NamedTuple):
    """One KTO example: an answer, and whether it is a good one."""

    prompt: str
    completion: str
    label: bool
    system: str | None = None
    history: tuple[str, ...] = ()

    @property
    def asked(self) -> Prompt:
        return Prompt(self.prompt, self.system, self.history)

    @property
    def messages(self) -> Messages:
        return conversation(*self.history, self.prompt, self.completion, system=self.system)


Record = Dialogue | Ranking | Prompt | Labelled
