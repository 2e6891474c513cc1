"""The three record types, validated: what a record of a data file must hold.

Each `parse_*` function turns the fields of one raw record into one of the types below, or raises a
`RecordError` that names the file, the line, the index, the field, what was found and what was expected.
"""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kochat_trl.data.rankings import Pair, Pairs, RankingOrder, Tiers, ranking_tiers, tier_pairs
from kochat_trl.errors import UserError

Kind = Literal["sft", "preference", "prompt"]
Fault = Literal["broken", "empty", "equal", "tied", "overlong"]
SHOWN = 3  # records named for each kind of fault in an error message

# Field names of one prompt and one answer: KoChatGPT's, Alpaca's, and those of Korean chatbot CSV files.
ANSWER_FIELDS = (("prompt", "completion"), ("instruction", "output"), ("Q", "A"))
COMPLETION_FIELD = re.compile(r"completion_(0|[1-9]\d*)")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = 8
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
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
        super().__init__(f"{source}: field '{field}': found {shown}, expected {expected}")
        self.source, self.field, self.expected, self.fault = source, field, expected, fault


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


class Turns(list[tuple[str, str]]):
    """A dialogue as a file has it: (speaker, text) for each turn."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in for the fields of a record that doesn't follow its file's format; the records after it do."""

    found: str
    expected: str


@dataclass(frozen=True)
class RawRecord:
    """The fields of a record as the file has them, before any check: a dict, `Turns`, or something unusable."""

    source: Source
    fields: Any

    def has(self, *fields: str) -> bool:
        """Whether the record has all of these fields. Raises `RecordError` if it isn't made of fields at all."""
        if isinstance(self.fields, Unreadable):
            raise RecordError(self.source, "(whole record)", Described(self.fields.found), self.fields.expected)
        if not isinstance(self.fields, dict):
            raise RecordError(self.source, "(whole record)", self.fields, "a JSON object")
        return all(field in self.fields for field in fields)

    def text(self, field: str) -> str:
        """The non-empty string under `field`."""
        return self.checked_text(field, self.fields.get(field))

    def system(self) -> str | None:
        """The system message under `system`; None where there is none, or it is blank."""
        return self.checked_system(self.fields.get("system"))

    def checked_system(self, value: Any) -> str | None:
        """`value` as a system message; None if it is blank."""
        blank = value is None or (isinstance(value, str) and not value.strip())
        return None if blank else self.checked_text("system", value)

    def checked_text(self, field: str, value: Any) -> str:
        """`value`, if it is a non-empty string that can be written as UTF-8."""
        if not isinstance(value, str) or not value.strip():
            blank = isinstance(value, str)
            raise RecordError(self.source, field, value, "a non-empty string", "empty" if blank else "broken")
        if not value.isascii() and _SURROGATE.search(value):
            raise RecordError(self.source, field, value, "text without half characters (\\ud800 to \\udfff)")
        return value


Messages = Sequence[dict[str, str]]  # of a chat template: role and content


def conversation(*texts: str, system: str | None = None) -> Messages:
    """User, assistant, user, ... in turn, after a system message if there is one."""
    first = [{"role": "system", "content": system}] if system else []
    return (*first, *({"role": _ROLES[i % 2], "content": text} for i, text in enumerate(texts)))


@dataclass(frozen=True)
class Dialogue:
    """One SFT example: texts of the user and the assistant in turn, the last one the assistant's."""

    texts: tuple[str, ...]
    system: str | None = None

    @property
    def messages(self) -> Messages:
        return conversation(*self.texts, system=self.system)


@dataclass(frozen=True)
class Ranking:
    """One reward example: completions of a prompt, ranked by `tiers`, best first. A chosen/rejected pair is k = 2."""

    prompt: str
    completions: tuple[str, ...]
    tiers: Tiers
    system: str | None = None

    def messages(self, completion: int) -> Messages:
        """The prompt with one of its completions."""
        return conversation(self.prompt, self.completions[completion], system=self.system)

    def pairs(self, pairs: Pairs = "all") -> list[Pair]:
        return tier_pairs(self.tiers, pairs)


@dataclass(frozen=True)
class Prompt:
    """One PPO example."""

    prompt: str
    system: str | None = None

    @property
    def messages(self) -> Messages:
        return conversation(self.prompt, system=self.system)

    @property
    def fields(self) -> dict[str, Any]:
        """As a file has it."""
        return {"prompt": self.prompt} | ({"system": self.system} if self.system else {})


Record = Dialogue | Ranking | Prompt


def kind_of(raw: RawRecord) -> Kind | None:
    """What a record is for, told by its fields; None if it can't be told."""
    fields = raw.fields
    if isinstance(fields, Turns):
        return "sft"
    if not isinstance(fields, dict):
        return None
    if {"chosen", "rejected", "ranking", "completion_0"} & fields.keys():
        return "preference"
    if "messages" in fields or any(answer in fields for _, answer in ANSWER_FIELDS):
        return "sft"
    return "prompt" if any(prompt in fields for prompt, _ in ANSWER_FIELDS) else None


def parse(raw: RawRecord, kind: Kind, order: RankingOrder = "best_first") -> Record:
    """`raw` as a record of `kind`; `order` is how a `ranking` is read."""
    if kind == "sft":
        return parse_sft(raw)
    return parse_preference(raw, order) if kind == "preference" else parse_prompt(raw)


def parse_sft(raw: RawRecord) -> Dialogue:
    """`prompt`/`completion`, `instruction`(/`input`)/`output`, `Q`/`A`, `messages`, or the turns of a dialogue."""
    if isinstance(raw.fields, Turns):
        return _dialogue(raw, raw.fields, ("<사람>", "<챗봇>"))
    if raw.has("messages"):
        messages = raw.fields["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise RecordError(raw.source, "messages", messages, "a list of {role, content}")
        turns = [(message.get("role"), message.get("content")) for message in messages]
        first = turns and turns[0][0] == "system"
        system = raw.checked_system(turns.pop(0)[1]) if first else raw.system()
        return _dialogue(raw, turns, _ROLES, system)
    for prompt_field, answer_field in ANSWER_FIELDS:
        if answer_field in raw.fields:
            return Dialogue((_prompt(raw, prompt_field), raw.text(answer_field)), raw.system())
    if raw.has("prompt"):
        raw.text("completion")  # is missing
    expected = "prompt + completion, instruction + output, Q + A, or messages"
    raise RecordError(raw.source, "(whole record)", sorted(raw.fields), expected)


def parse_preference(raw: RawRecord, order: RankingOrder = "best_first") -> Ranking:
    """`prompt`/`chosen`/`rejected`, or KoChatGPT's `completion_0 … completion_k` with a `ranking`, read as `order`."""
    if raw.has("chosen") or raw.has("rejected"):
        prompt, chosen, rejected = (raw.text(field) for field in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise RecordError(raw.source, "rejected", rejected, "a text that differs from 'chosen'", "equal")
        return Ranking(prompt, (chosen, rejected), ((0,), (1,)), raw.system())
    if not raw.has("ranking"):
        expected = "prompt + chosen + rejected or prompt + completion_0..k + ranking"
        raise RecordError(raw.source, "(whole record)", sorted(raw.fields), expected)
    count = sum(COMPLETION_FIELD.fullmatch(field) is not None for field in raw.fields)
    if count < 2:
        expected = "completion_0 and completion_1 at least"
        raise RecordError(raw.source, "(whole record)", sorted(raw.fields), expected)
    try:
        tiers = ranking_tiers(raw.fields["ranking"], count, order)
    except ValueError as error:
        raise RecordError(raw.source, "ranking", raw.fields["ranking"], str(error)) from None
    prompt = _prompt(raw, "prompt")
    completions = [raw.text(f"completion_{i}") for i in range(count)]
    if len(set(completions)) < count:
        i = next(i for i, text in enumerate(completions) if text in completions[:i])
        expected = "a text that no other completion has"
        raise RecordError(raw.source, f"completion_{i}", completions[i], expected, "equal")
    if len(tiers) < 2:
        expected = "at least one completion that is better than another"
        raise RecordError(raw.source, "ranking", raw.fields["ranking"], expected, "tied")
    return Ranking(prompt, tuple(completions), tiers, raw.system())


def parse_prompt(raw: RawRecord) -> Prompt:
    """The prompt of any record: `prompt`, `instruction`(/`input`), `Q`, or the first turn of a dialogue."""
    if isinstance(raw.fields, Turns):
        first = raw.fields[0] if raw.fields else ("<사람>", None)
        if first[0] != "<사람>":
            raise RecordError(raw.source, "turn 0", first[0], "<사람>")
        return Prompt(raw.checked_text("turn 0", first[1]))
    if raw.has("messages"):
        dialogue = parse_sft(raw)
        return Prompt(dialogue.texts[0], dialogue.system)
    for field, _ in ANSWER_FIELDS:
        if field in raw.fields:
            return Prompt(_prompt(raw, field), raw.system())
    raise RecordError(raw.source, "prompt", sorted(raw.fields), "a prompt")


def _prompt(raw: RawRecord, field: str) -> str:
    prompt = raw.text(field)
    more = raw.fields.get("input") if field == "instruction" else None
    if more is None or (isinstance(more, str) and not more.strip()):
        return prompt
    return f"{prompt}\n\n{raw.text('input')}"


def _dialogue(
    raw: RawRecord, turns: Sequence[tuple[Any, Any]], speakers: tuple[str, str], system: str | None = None
) -> Dialogue:
    if len(turns) < 2 or len(turns) % 2:
        expected = f"an even number: {', '.join(speakers)}, {speakers[0]}, ..."
        raise RecordError(raw.source, "turns", Described(f"{len(turns)} turns"), expected)
    for i, (speaker, content) in enumerate(turns):
        if speaker != speakers[i % 2]:
            raise RecordError(raw.source, f"turn {i}", speaker, speakers[i % 2])
        raw.checked_text(f"turn {i}", content)
    return Dialogue(tuple(content for _, content in turns), system)
