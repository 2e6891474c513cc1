"""A data file → a mended one in KoChatGPT's shape, and a report: the engine of `kochat data clean`.

Each fault of `faults.py` has a fix of the same name. Those that were chosen are applied in this order:

1. The faults of a text are mended, again and again until nothing changes: mending one may bring out another.
2. A record that recipes refuse (broken, empty, equal) is dropped. Without that fix the file is refused: what can't be
   read can't be put in another shape either, and nothing is guessed.
3. A record with a fault of its own is dropped, then one with a fault among the records that are left.

What is left has none of these faults, so cleaning it again with the same fixes changes nothing.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from kochat_trl.data.rankings import RankingOrder, ranking_tiers
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, read_records
from kochat_trl.data.records import (
    ANSWER_FIELDS,
    COMPLETION_FIELD,
    Kind,
    Ranking,
    RawRecord,
    Record,
    RecordError,
    Turns,
    Unreadable,
    kind_of,
    parse,
    parse_prompt,
    summarize,
)
from kochat_trl.data.text import normalized
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS, is_text_field, texts, with_texts
from kochat_trl.desk.curation.finders import Item, bad_tokens, contradictions, overlaps, overlong, own_faults, repeats
from kochat_trl.desk.writers import to_json, write_records
from kochat_trl.errors import UserError, nearest
from kochat_trl.files import new_file, refuse_existing

from tqdm.auto import tqdm

Faults = dict[str, None]  # the names of what was found, once each, in that order
_BEGINS_TURN = re.compile(rf"\n\s*(?:{DIALOGUE_START}|(?:{'|'.join(SPEAKERS)}):)")


@dataclass(frozen=True)
class Summary:
    """What `clean_file` did, in records. `faults` counts those that had each fault, mended or dropped."""

    file: str
    read: int
    written: int
    changed: int
    dropped: int
    faults: dict[str, int]


@dataclass(eq=False)
class _Entry(Item):
    """A record on its way: `raw` is as it is to be written, `old` as it was read."""

    old: RawRecord
    faults: Faults = field(default_factory=dict)
    dropped: bool = False
    error: RecordError | None = None  # that recipes raise

    def drop(self, fault: str) -> None:
        self.dropped = True
        self.faults[fault] = None


def clean_file(
    file: str | Path,
    output: str | Path,
    *,
    report: str | Path,
    fixes: Collection[str] | None = None,
    kind: Kind | None = None,
    order: RankingOrder = "best_first",
    tokenizer: Any = None,
    max_length: int | None = None,
    against: Sequence[str] = (),
) -> Summary:
    """Write what `fixes` (None: the default ones of `FAULTS`) leave of `file` as the new file `output`.

    `output` is a JSON array with KoChatGPT's field names and best-first rankings, whatever `order` they were read
    with. Dialogues stay in their text shape, and a file of nothing but `messages` gets it if it holds them exactly.
    `report` has a JSON line for each record that was changed or dropped: `index`, `line`, `action`, `faults`, and
    the fields `before` and `after` that differ; of a dropped record all fields, and the `error` if recipes raise one.
    `kind` is told by the fields unless given. `against` names files whose prompts are to be left out (`overlap`).

    Raises `UserError` if a name is taken, a fix is unknown or lacks what it needs, the file can't be read, its kind
    can't be told, or it has records that recipes refuse and their fix wasn't chosen.
    """
    chosen = _chosen_fixes(fixes, tokenizer, max_length, against)
    if len({Path(path).resolve() for path in (file, output, report)}) < 3:
        raise UserError(f"{file}, {output}, {report}: the file, the output and the report need a name each")
    refuse_existing(output)
    refuse_existing(report)
    raws = list(tqdm(read_records(file), desc=f"Reading {file}", delay=2, leave=False))
    kind = kind or _file_kind(file, raws)
    entries = [_entry(raw, kind, order, chosen) for raw in raws]
    errors = [entry.error for entry in entries if entry.error and entry.error.fault not in chosen]
    if errors:
        raise UserError(
            f"{len(errors)} of {len(raws)} records can't be rewritten:\n{summarize(errors)}\nMend them by hand, or "
            f"choose the fixes that drop them, too: {', '.join(sorted({error.fault for error in errors}))}"
        )
    shared = set(_prompts(against, chosen))
    finders: tuple[Callable[[list[_Entry]], Iterable[tuple[_Entry, str]]], ...] = (
        lambda left: chain(overlaps(left, shared), own_faults(left)),
        lambda left: bad_tokens(left, tokenizer) if {"unknown_token", "round_trip"} & chosen else (),
        lambda left: overlong(left, tokenizer, max_length or 0) if "overlong" in chosen else (),
        partial(repeats, fault="duplicate"),
        partial(repeats, fault="near_duplicate"),
        contradictions,
        partial(repeats, fault="repeated_prompt"),
    )
    for find in finders:
        for entry, fault in find([entry for entry in entries if not entry.dropped]):
            if fault in chosen:
                entry.drop(fault)
    left = [entry for entry in entries if not entry.dropped]
    with new_file(report) as stream:  # appears after the output
        stream.writelines(f"{_visible(_report(entry, kind, order))}\n" for entry in entries if entry.faults)
        dialogues = [_as_dialogue(entry.raw.fields) for entry in left]
        if dialogues and None not in dialogues:
            write_records(output, "dialogues", dialogues)
        else:
            write_records(output, "array", (_without_messages(entry.raw.fields) for entry in left))
    counts = Counter(fault for entry in entries for fault in entry.faults)
    faults = {fault: counts[fault] for fault in FAULTS if fault in counts}
    changed = sum(bool(entry.faults) for entry in left)
    return Summary(str(file), len(raws), len(left), changed, len(raws) - len(left), faults)


def _chosen_fixes(
    fixes: Collection[str] | None, tokenizer: Any, max_length: int | None, against: Sequence[str]
) -> set[str]:
    chosen = {fault.name for fault in FAULTS.values() if fault.default} if fixes is None else set(fixes)
    for name in sorted(chosen - FAULTS.keys()):
        raise UserError(f"there is no fix '{name}'{nearest(name, set(FAULTS), '.')} The fixes are: {', '.join(FAULTS)}")
    if against:
        chosen.add("overlap")
    if max_length is not None:
        chosen.add("overlong")
    needs = [(fault, "--tokenizer", tokenizer is None) for fault in ("unknown_token", "round_trip", "overlong")]
    needs += [("overlong", "--max-length", max_length is None), ("overlap", "--against", not against)]
    for name, flag, missing in needs:
        if name in chosen and missing:
            raise UserError(f"the fix '{name}' needs {flag}")
    return chosen


def _file_kind(file: str | Path, raws: Sequence[RawRecord]) -> Kind:
    """What the records are for. Those without an answer are taken for broken only where most have one."""
    counts = Counter(kind for raw in raws if (kind := kind_of(raw)))
    answered: list[Kind] = [kind for kind in counts if kind != "prompt"]
    if len(answered) > 1 or any(counts["prompt"] >= counts[kind] for kind in answered):
        found = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        raise UserError(f"{file} has records of different kinds ({found}): say with --kind what they are for")
    if raws and not counts:
        raise UserError(f"{file}: no record has fields that tell what it is for: say it with --kind")
    return answered[0] if answered else "prompt"


def _prompts(files: Sequence[str], fixes: Collection[str]) -> Iterator[str]:
    """The prompts of `files` after the same mending, for comparison."""
    for raw in chain.from_iterable(map(read_records, files)):
        with suppress(RecordError):
            yield normalized(parse_prompt(_mended(raw, fixes, {})).prompt)


# --- One record -----------------------------------------------------------------------------------


def _entry(raw: RawRecord, kind: Kind, order: RankingOrder, fixes: Collection[str]) -> _Entry:
    """`raw` mended and in KoChatGPT's shape; dropped, with its `error`, if recipes refuse it even so.

    It is dropped, too, if it can't be put in that shape, or if too little of a ranking is left without its copies.
    """
    entry = _Entry(raw, None, raw)
    try:
        new = _mended(raw, fixes, entry.faults)
        _parse_but({"equal", "tied"}, new, kind, order)  # the shape of these is sound
        new = RawRecord(raw.source, _kochatgpt_fields(new.fields, kind, order))
        new = _mended(new, fixes, entry.faults)  # an `input` has joined its `instruction`
        if "equal" in fixes and kind == "preference" and "chosen" not in new.fields:
            new = _without_copies(new, entry.faults)
        entry.raw, entry.record = new, _parse_but({"tied"}, new, kind)
        if not entry.record:  # nothing but a tie is taken, too: to drop it is a fix of its own
            completions = _completions(new.fields)
            tiers = ranking_tiers(new.fields["ranking"], len(completions))
            entry.record = Ranking(new.fields["prompt"], completions, tiers, new.system())
    except RecordError as error:
        entry.error = error
        entry.drop(error.fault)
    return entry


def _parse_but(faults: Collection[str], raw: RawRecord, *how: Any) -> Record | None:
    """`parse`, or None for a record that has one of `faults`."""
    try:
        return parse(raw, *how)
    except RecordError as error:
        if error.fault in faults:
            return None
        raise


def _mended(raw: RawRecord, fixes: Collection[str], faults: Faults) -> RawRecord:
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


def _kochatgpt_fields(fields: Any, kind: Kind, order: RankingOrder) -> Any:
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


# --- Output -------------------------------------------------------------------------------------


def _report(entry: _Entry, kind: Kind, order: RankingOrder) -> dict[str, Any]:
    source = entry.old.source
    line: dict[str, Any] = {"index": source.index, "line": source.line}
    if entry.dropped:
        line |= {"action": "dropped", "faults": list(entry.faults), "before": _by_name(entry.old.fields)}
        return line | ({"error": str(entry.error)} if entry.error else {})
    old, new = _by_name(_kochatgpt_fields(entry.old.fields, kind, order)), _by_name(entry.raw.fields)
    before = {name: value for name, value in old.items() if new.get(name) != value}
    after = {name: value for name, value in new.items() if old.get(name) != value}
    return line | {"action": "changed", "faults": list(entry.faults), "before": before, "after": after}


def _by_name(fields: Any) -> dict[str, Any]:
    """Fields as a report shows them."""
    if isinstance(fields, Turns):
        return {f"turn {i}": text for i, (_, text) in enumerate(fields)}
    found = fields.found if isinstance(fields, Unreadable) else fields
    return found if isinstance(found, dict) else {"(whole record)": found}


def _visible(line: dict[str, Any]) -> str:
    """JSON in which what can't be seen is escaped."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in to_json(line))


def _as_dialogue(fields: Any) -> Turns | None:
    """`fields` as a dialogue, if that holds all there is in them."""
    if isinstance(fields, Turns):
        return fields
    messages = fields["messages"] if fields.keys() == {"messages"} else []
    contents = [message["content"] for message in messages if message.keys() == {"role", "content"}]
    if not messages or len(contents) < len(messages) or messages[0]["role"] == "system":
        return None
    if any(_as_turn(text) != text or _BEGINS_TURN.search(text) for text in contents):
        return None
    return Turns(zip(cycle(SPEAKERS), contents, strict=False))


def _without_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """One exchange as `prompt` and `completion`; more don't go into KoChatGPT's arrays, and stay `messages`."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or len(messages) != 2 or any(map(is_text_field, fields)):
        return fields
    if any(message.keys() != {"role", "content"} for message in messages):
        return fields
    prompt, completion = (message["content"] for message in messages)
    return {"prompt": prompt, "completion": completion} | {k: v for k, v in fields.items() if k != "messages"}
