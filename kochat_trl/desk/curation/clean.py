"""A data file → a mended one in the shape that came in, and a report: the engine of `kochat data clean`.

Each fault of `faults.py` has a fix of the same name. Those that were chosen are applied in this order:

1. The faults of a text are mended, again and again until nothing changes: mending one may bring out another.
2. A record that recipes refuse (broken, empty, equal, without a pair) is dropped. Without that fix the file is refused,
   and so is one with fields that can't be told: nothing is guessed.
3. A record with a fault of its own is dropped, then one with a fault among the records that are left.

What is left has none of these faults, so cleaning it again with the same fixes changes nothing.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from kochat_trl.data.example import Example
from kochat_trl.data.layout import Plan, RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.rankings import RankingOrder, counted_from_0
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, file_format, read_records
from kochat_trl.data.reading import check_columns
from kochat_trl.data.records import RecordError, Unreadable, summarize
from kochat_trl.data.shapes import Kind
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS
from kochat_trl.desk.curation.finders import (
    Item,
    asked_keys,
    bad_tokens,
    contradictions,
    overlaps,
    overlong,
    own_faults,
    repeats,
)
from kochat_trl.desk.curation.texts import mended, texts
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
    options: ReadingOptions = DEFAULTS,
    tokenizer: Any = None,
    max_length: int | None = None,
    against: Sequence[str] = (),
) -> Summary:
    """Write what `fixes` (None: the default ones of `FAULTS`) leave of `file` as the new file `output`.

    `output` has the shape that came in, its names and notations too, and so is read with the same `options`, but for
    an `encoding`: it is UTF-8.
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
    file_shape = file_format(file, options)
    raws = list(tqdm(read_records(file, options), desc=f"Reading {file}", delay=2, leave=False))
    kind = kind or _file_kind(file, raws)
    entries = [_entry(raw, kind, chosen, file_shape.shape) for raw in raws]
    check_columns([raw.layout for raw in raws[:1]])
    errors = [entry.error for entry in entries if entry.error and entry.error.fault not in chosen | {"tied"}]
    if errors:
        raise UserError(
            f"{len(errors)} of {len(raws)} records can't be rewritten:\n{summarize(errors)}\nMend them by hand, or "
            f"choose the fixes that drop them, too: {', '.join(sorted({error.fault for error in errors}))}"
        )
    shared = set(_prompts(against, chosen, options))
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
        stream.writelines(f"{_visible(_report(entry))}\n" for entry in entries if entry.faults)
        try:
            write_records(output, file_shape, (entry.raw.fields for entry in left))
        except UserError as error:
            raise UserError(f"{file}: what is left of it can't be written in its format: {error}") from None
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


def _prompts(files: Sequence[str], fixes: Collection[str], options: ReadingOptions) -> Iterator[str]:
    """The prompts of `files` after the same mending, for comparison."""
    for raw in chain.from_iterable(read_records(file, options) for file in files):
        with suppress(RecordError):
            yield from chain(*map(asked_keys, parse(_mended(raw, fixes, {}), "prompt")))


# --- One record -----------------------------------------------------------------------------------


def _entry(raw: RawRecord, kind: Kind, fixes: Collection[str], shape: str) -> _Entry:
    """`raw` mended; dropped, with its `error`, if recipes refuse it even so, or too little is left without copies."""
    entry = _Entry(raw, [], raw)
    try:
        new = _mended(raw, fixes, entry.faults, shape)
        if "equal" in fixes and kind != "prompt":
            new = _without_copies(new, entry.faults)
        entry.raw, entry.records = new, parse(new, kind)
    except RecordError as error:
        entry.error = error
        entry.drop(error.fault)
    return entry


def _mended(raw: RawRecord, fixes: Collection[str], faults: Faults, shape: str = "lines") -> RawRecord:
    """`raw` with its texts mended; the names of what was found are added to `faults`.

    Raises `RecordError` for a turn with a line, or a tag, that would begin another turn.
    """
    new = {}
    for place, (_, text) in texts(raw, repeated=True).items():
        before = None
        while text != before:  # ends: each mend shortens the text, or leaves less that it could replace
            before = text
            for fault in TEXT_FAULTS:
                if fault.name in fixes and fault.mend and (without := fault.mend(text)) != text:
                    text = without
                    faults[fault.name] = None
            text = text.strip() if "#" in place else _as_kept(text, shape)
        if shape == "dialogues" and _BEGINS_TURN.search(text):
            raise RecordError(raw.source, f"turn {place[1]}", text, "no line that begins as a turn does")
        new[place] = text
    other = mended(raw, new) if new else raw
    for place, (_, text) in texts(other, repeated=True).items() if faults else ():
        if new.get(place) != text:
            raise RecordError(raw.source, str(place[0]), text, "no tag of a speaker that mending brings out")
    return other


def _as_kept(text: str, shape: str) -> str:
    """`text` as it comes back from a file of dialogues, or of a prompt a line."""
    if shape == "dialogues":
        return "\n".join(line.rstrip("\r") for line in text.strip().split("\n"))
    return " ".join(re.split("[\r\n]+", text)) if shape == "text" else text


def _without_copies(raw: RawRecord, faults: Faults) -> RawRecord:
    """A record with the best copy of each of its answers, in their old order and under the first of their names.

    Raises `RecordError` if there are copies, and too little is left without them.
    """
    fields = raw.known_fields()
    plan = raw.layout.plan(fields)
    if plan.shape is None or plan.each or plan.problem or "completions" not in plan.paths or "winner" in plan.paths:
        return raw
    example = Example(raw, plan, fields)
    ordered = example.ordered_by != "completions"
    try:
        named = example.candidates()
        answers = example.answers(example.asked(), named)[1]
        tiers = example.tiers([name for name, _ in named])[0] if ordered else ()
    except RecordError:
        return raw  # for another reason
    best_last = [*range(len(answers))[::-1], *(i for tier in tiers[::-1] for i in tier[::-1])]
    kept = sorted({answers[i]: i for i in best_last}.values())
    if len(kept) == len(answers):
        return raw
    if ordered and sum(any(i in kept for i in tier) for tier in tiers) < 2:
        expected = "two answers that differ, one better than the other"
        raise RecordError(raw.source, "(answers)", answers, expected, "equal")
    faults["equal"] = None
    return replace(raw, fields=_keeping(raw, plan, kept, len(answers)))


def _keeping(raw: RawRecord, plan: Plan, kept: Sequence[int], count: int) -> dict[str, Any]:
    """The fields of a record with some of its `count` answers alone, and with their order."""
    fields = dict(raw.fields)
    done: set[str] = set()
    for role in ("completions", "scores", "ranks", "ranking"):
        names = [name for name in dict.fromkeys(path[0] for path in plan.paths.get(role, ())) if name not in done]
        done.update(names)
        if len(names) > 1:
            moved = [raw.fields[names[i]] for i in kept]
            fields |= dict(zip(names, moved, strict=False))
            for name in names[len(kept) :]:
                del fields[name]
        elif names and role == "ranking":
            fields[names[0]] = _renumbered(fields[names[0]], kept, count, raw.layout.options.ranking_order)
        elif names and isinstance(raw.fields[names[0]], list):
            fields[names[0]] = [raw.fields[names[0]][i] for i in kept]
    return fields


def _renumbered(ranking: Any, kept: Sequence[int], count: int, order: RankingOrder) -> Any:
    """A ranking with the answers `kept` of `count` alone, in the notation that it had."""
    numbers, base = counted_from_0(ranking, count)
    if order == "rank_of":
        left = [numbers[i] + (base or 0) if isinstance(ranking, str) else ranking[i] for i in kept]
    else:
        as_text = "'" in repr(ranking)
        new = {i: str(place + (base or 0)) if as_text else place + (base or 0) for place, i in enumerate(kept)}
        tiers = [[new[i] for i in (tier if isinstance(tier, list) else [tier]) if i in new] for tier in numbers]
        left = [tier[0] if len(tier) == 1 else tier for tier in tiers if tier]
    if not isinstance(ranking, str):
        return left
    head, *between, tail = re.split(r"\d+", ranking)
    return f"{head}{between[0].join(map(str, left))}{tail}"


# --- Output -------------------------------------------------------------------------------------


def _report(entry: _Entry) -> dict[str, Any]:
    source = entry.old.source
    line: dict[str, Any] = {"index": source.index, "line": source.line}
    if entry.dropped:
        line |= {"action": "dropped", "faults": list(entry.faults), "before": _by_name(entry.old.fields)}
        return line | ({"error": str(entry.error)} if entry.error else {})
    old, new = dict(_leaves(entry.old.fields)), dict(_leaves(entry.raw.fields))
    before = {name: value for name, value in old.items() if name not in new or new[name] != value}
    after = {name: value for name, value in new.items() if name not in old or old[name] != value}
    return line | {"action": "changed", "faults": list(entry.faults), "before": before, "after": after}


def _by_name(fields: Any) -> dict[str, Any]:
    """Fields as a report shows them."""
    found = fields.found if isinstance(fields, Unreadable) else fields
    return found if isinstance(found, dict) else {"(whole record)": found}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a record under the names that a report has: `messages[1].content`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list | str) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    else:
        yield name, value


def _visible(line: dict[str, Any]) -> str:
    """JSON in which what can't be seen is escaped."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in to_json(line))
