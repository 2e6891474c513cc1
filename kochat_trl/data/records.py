"""The three record types, validated: what a line of a data file must hold.

Each `parse_*` function turns the fields of one raw record into the types below, or raises a
`RecordError` that names the file, the line, the index, the field, what was found and what was expected.
"""

import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .rankings import ranking_pairs

SHOWN = 5  # broken records printed before "and N more"


@dataclass(frozen=True)
class Source:
    """Where a record came from: `index` counts records from 0, `line` counts lines from 1."""

    file: str
    index: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line} (record {self.index})"


class RecordError(UserError):
    """One record that can't be used."""

    def __init__(self, source: Source, field: str, found: Any, expected: str):
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{source}: field '{field}': found {shown}, expected {expected}")
        self.source, self.field = source, field


class BrokenRecordsError(UserError):
    """Some records of the input can't be used, and the config says to refuse them."""

    def __init__(self, errors: list[RecordError]):
        lines = [f"  {error}" for error in errors[:SHOWN]]
        if len(errors) > SHOWN:
            lines.append(f"  ... and {len(errors) - SHOWN} more")
        lines.append("Mend the file, or set `invalid_records: skip` to leave these out and list them.")
        super().__init__(f"{len(errors)} records can't be used:\n" + "\n".join(lines))


class Turns(list[tuple[str, str]]):
    """A dialogue as a file has it: (speaker, text) for each turn."""


@dataclass(frozen=True)
class RawRecord:
    """The fields of a record as the file has them, before any check."""

    source: Source
    fields: Any

    def text(self, field: str) -> str:
        """The non-empty string under `field`."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise RecordError(self.source, field, value, "a non-empty string")
        return value


@dataclass(frozen=True)
class Dialogue:
    """One SFT example: alternating `user` and `assistant` turns, ending with the assistant's."""

    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Preference:
    """One reward example: `chosen` is the better of two completions of `prompt`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """One PPO example."""

    prompt: str


def _has(raw: RawRecord, *fields: str) -> bool:
    if not isinstance(raw.fields, dict):
        raise RecordError(raw.source, "(whole record)", raw.fields, "a JSON object")
    return all(field in raw.fields for field in fields)


def _turns(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))


def parse_sft(raw: RawRecord) -> list[Dialogue]:
    """KoChatGPT's `prompt`/`completion`, `instruction`(/`input`)/`output`, or the turns of a dialogue."""
    if isinstance(raw.fields, Turns):
        turns = raw.fields
        if len(turns) < 2 or len(turns) % 2:
            raise RecordError(
                raw.source,
                "turns",
                f"{len(turns)} turns",
                "an even number: <사람>, <챗봇>, <사람>, ...",
            )
        for i, (speaker, content) in enumerate(turns):
            expected = "<챗봇>" if i % 2 else "<사람>"
            if speaker != expected:
                raise RecordError(raw.source, f"turn {i}", speaker, expected)
            if not content.strip():
                raise RecordError(raw.source, f"turn {i}", content, "a non-empty text")
        return [Dialogue(_turns(*(content for _, content in turns)))]
    if _has(raw, "instruction", "output"):
        prompt = raw.text("instruction")
        if raw.fields.get("input"):
            prompt = f"{prompt}\n\n{raw.text('input')}"
        return [Dialogue(_turns(prompt, raw.text("output")))]
    if _has(raw, "prompt") or _has(raw, "completion"):
        return [Dialogue(_turns(raw.text("prompt"), raw.text("completion")))]
    raise RecordError(
        raw.source,
        "(whole record)",
        sorted(raw.fields),
        "prompt + completion or instruction + output",
    )


def parse_preference(raw: RawRecord) -> list[Preference]:
    """`prompt`/`chosen`/`rejected`, or KoChatGPT's `completion_0..k` with a best-first `ranking`."""
    if _has(raw, "chosen") or _has(raw, "rejected"):
        prompt, chosen, rejected = (raw.text(field) for field in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise RecordError(raw.source, "rejected", rejected, "a text that differs from 'chosen'")
        return [Preference(prompt, chosen, rejected)]
    if not _has(raw, "ranking"):
        raise RecordError(
            raw.source,
            "(whole record)",
            sorted(raw.fields),
            "prompt + chosen + rejected or prompt + completion_0..k + ranking",
        )
    prompt, ranking = raw.text("prompt"), raw.fields["ranking"]
    count = sum(bool(re.fullmatch(r"completion_\d+", field)) for field in raw.fields)
    if not isinstance(ranking, list) or sorted(map(repr, ranking)) != sorted(map(repr, range(count))):
        raise RecordError(raw.source, "ranking", ranking, f"the indices 0 to {count - 1}, each once, best first")
    completions = [raw.text(f"completion_{i}") for i in range(count)]
    for i, text in enumerate(completions):
        if text in completions[:i]:
            raise RecordError(raw.source, f"completion_{i}", text, "a text that no other completion has")
    return [Preference(prompt, completions[better], completions[worse]) for better, worse in ranking_pairs(ranking)]


def parse_prompt(raw: RawRecord) -> list[Prompt]:
    """KoChatGPT's `prompt`; other fields are ignored."""
    if not _has(raw, "prompt"):
        raise RecordError(raw.source, "prompt", sorted(raw.fields), "a prompt")
    return [Prompt(raw.text("prompt"))]
