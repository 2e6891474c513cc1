"""A record → the same one mended and in KoChatGPT's shape, for `clean.py`."""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import cycle
from typing import Any

from kochat_trl.data.rankings import RankingOrder, ranking_tiers
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS
from kochat_trl.data.records import (
    ANSWER_FIELDS,
    COMPLETION_FIELD,
    Kind,
    Ranking,
    RawRecord,
    Record,
    RecordError,
    Turns,
    parse,
)
from kochat_trl.desk.curation.faults import TEXT_FAULTS, is_text_field, texts, with_texts

Faults = dict[str, None]  # the names of what was found, once each, in that order
_BEGINS_TURN = re.compile(rf"\n\s*(?:{DIALOGUE_START}|(?:{'|'.join(SPEAKERS)}):)")


def rewritten(raw: RawRecord, kind: Kind, order: RankingOrder, fixes: Collection[str], faults: Faults) -> RawRecord:
    """`raw` mended and in KoChatGPT's shape; what was mended is added to `faults`.

    Raises `RecordError` if it can't be put in that shape, or if too little of a ranking is left without its copies.
    """
    new = mended(raw, fixes, faults)
    try:
        parse(new, kind, order)
    except RecordError as error:
        if error.fault not in ("equal", "tied"):  # the shape of these is sound
            raise
    new = RawRecord(raw.source, kochatgpt_fields(new.fields, kind, order))
    new = mended(new, fixes, faults)  # an `input` has joined its `instruction`
    if "equal" in fixes and kind == "preference" and "chosen" not in new.fields:
        new = _without_copies(new, faults)
    return new


def parse_rewritten(raw: RawRecord, kind: Kind) -> Record:
    """`parse` after rewriting. A ranking that is nothing but a tie is taken, too: to drop it is a fix of its own."""
    try:
        return parse(raw, kind)
    except RecordError as error:
        if error.fault != "tied":
            raise
    completions = _completions(raw.fields)
    return Ranking(raw.fields["prompt"], completions, ranking_tiers(raw.fields["ranking"], len(completions)))


def mended(raw: RawRecord, fixes: Collection[str], faults: Faults) -> RawRecord:
    """`raw` with its texts mended; the names of what was found are added to `faults`.

    Raises `RecordError` for a turn of a dialogue with a line that would begin another turn.
    """
    is_dialogue = isinstance(raw.fields, Turns)
    new = {}
    for name, text in texts(raw).items():
        before = None
        while text != before:  # ends: each mend shortens the text, or leaves less that it could replace
            before = text
            for fault in TEXT_FAULTS:
                if fault.name in fixes and fault.mend and (without := fault.mend(text)) != text:
                    text = without
                    faults[fault.name] = None
            text = _as_turn(text) if is_dialogue else text
        if is_dialogue and _BEGINS_TURN.search(text):
            raise RecordError(raw.source, f"turn {name}", text, "no line that begins as a turn does")
        new[name] = text
    return RawRecord(raw.source, with_texts(raw, new)) if new else raw


def _as_turn(text: str) -> str:
    """`text` as it comes back from a file of dialogues."""
    return "\n".join(line.rstrip("\r") for line in text.strip().split("\n"))


def kochatgpt_fields(fields: Any, kind: Kind, order: RankingOrder) -> Any:
    """The fields of a sound record under KoChatGPT's names, in their own order; other fields are kept.

    A record that has fields of these names for something else is left as it is.
    """
    if not isinstance(fields, dict) or (kind != "preference" and "messages" in fields):
        return fields
    if kind == "preference":
        if "chosen" not in fields:
            tiers = ranking_tiers(fields["ranking"], len(_completions(fields)), order)
            return fields | {"ranking": _best_first(tiers)}
        if "ranking" in fields or any(map(COMPLETION_FIELD.fullmatch, fields)):
            return fields
        names = {"chosen": "completion_0", "rejected": "completion_1"}
        return {names.get(name, name): value for name, value in fields.items()} | {"ranking": [0, 1]}
    prompt, answer = next(pair for pair in ANSWER_FIELDS if pair[kind == "sft"] in fields)  # as `parse` chooses
    names = {prompt: "prompt", answer: "completion"}
    if any(name in fields and new in fields for name, new in names.items() if name != new):
        return fields
    if prompt == "instruction" and "input" in fields:
        more = fields["input"]
        joined = f"{fields[prompt]}\n\n{more}" if more and more.strip() else fields[prompt]
        fields = {name: joined if name == prompt else fields[name] for name in fields if name != "input"}
    return {names.get(name, name): value for name, value in fields.items()}


def _completions(fields: dict[str, Any]) -> tuple[str, ...]:
    return tuple(fields[f"completion_{i}"] for i in range(len(list(filter(COMPLETION_FIELD.fullmatch, fields)))))


def _best_first(tiers: Iterable[Sequence[int]]) -> list[int | list[int]]:
    return [tier[0] if len(tier) == 1 else list(tier) for tier in tiers]


def _without_copies(raw: RawRecord, faults: Faults) -> RawRecord:
    """A ranking with the best copy of each completion, numbered from 0 in their old order.

    Raises `RecordError` if there are copies, and too little is left without them.
    """
    completions = _completions(raw.fields)
    tiers = ranking_tiers(raw.fields["ranking"], len(completions))
    best_last = [*range(len(completions))[::-1], *(i for tier in tiers[::-1] for i in tier[::-1])]
    kept = sorted({completions[i]: i for i in best_last}.values())
    if len(kept) == len(completions):
        return raw
    left = [tier for old in tiers if (tier := [kept.index(i) for i in old if i in kept])]
    if len(left) < 2:
        expected = "two completions that differ, one better than the other"
        raise RecordError(raw.source, "ranking", raw.fields["ranking"], expected, "equal")
    faults["equal"] = None
    names = {f"completion_{old}": f"completion_{new}" for new, old in enumerate(kept)}
    fields = {names.get(k, k): v for k, v in raw.fields.items() if k in names or not COMPLETION_FIELD.fullmatch(k)}
    return RawRecord(raw.source, fields | {"ranking": _best_first(left)})


# --- Dialogues and messages ---------------------------------------------------------------------


def as_dialogue(fields: Any) -> Turns | None:
    """`fields` as a dialogue, if that holds all there is in them."""
    if isinstance(fields, Turns):
        return fields
    messages = fields["messages"] if fields.keys() == {"messages"} else []
    contents = [message["content"] for message in messages if message.keys() == {"role", "content"}]
    if not messages or len(contents) < len(messages):
        return None
    if any(_as_turn(text) != text or _BEGINS_TURN.search(text) for text in contents):
        return None
    return Turns(zip(cycle(SPEAKERS), contents, strict=False))


def without_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """One exchange as `prompt` and `completion`; more don't go into KoChatGPT's arrays, and stay `messages`."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or len(messages) != 2 or any(map(is_text_field, fields)):
        return fields
    if any(message.keys() != {"role", "content"} for message in messages):
        return fields
    prompt, completion = (message["content"] for message in messages)
    return {"prompt": prompt, "completion": completion} | {k: v for k, v in fields.items() if k != "messages"}
