"""Raw records → what a stage takes of them: dialogues, rankings, prompts, labelled answers."""

from collections.abc import Callable
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.example import Asked, Example
from kochat_trl.data.layout import Plan, RawRecord, help_for, shown, texts_in, value_at
from kochat_trl.data.records import Described, Dialogue, Labelled, Ranking, Record, RecordError, in_columns, in_map
from kochat_trl.data.shapes import Kind


def kind_of(raw: RawRecord) -> Kind | None:
    """What a record is for, told by its fields; None if it can't be told."""
    if not isinstance(raw.fields, dict):
        return None
    plan = raw.layout.plan(raw.known_fields())
    roles = frozenset(plan.paths)
    shape = plan.shape or shapes.nearest(roles) or (shapes.out_of_place(roles) or (None, None))[1]
    if shape and shape.needs == "messages" and (path := plan.path("messages")):
        turns = value_at(raw.fields, path)
        last = turns[-1] if isinstance(turns, list) and turns else None
        speaker = next((last[name] for name in last if shapes.is_speaker(name)), None) if isinstance(last, dict) else ""
        return "prompt" if shapes.SPEAKER.get(str(speaker).lower()) == "user" else "sft"
    return shape.kind if shape else None


def shape_of(raw: RawRecord) -> shapes.Shape | None:
    """The row of `shapes.py` that a record is, if it is one."""
    return raw.layout.plan(raw.known_fields()).shape


def parse(raw: RawRecord, kind: Kind) -> list[Record]:
    """`raw` as records of `kind`: one, or as many as it has examples; none if its label says so.

    Labelled answers come as they are where `kind` is preference: `paired` makes rankings of those to one prompt.
    """
    fields = raw.known_fields()
    plan = raw.layout.plan(fields)
    if raw.layout.unseen:
        raw.layout.look_for_columns(raw.fields)
    if fields is not raw.fields:
        _check_nulls(raw)
    if not plan.whole:
        _check_understood(raw, plan, fields)
    if not plan.each:
        return _READ[kind](Example(raw, plan, fields))
    items = fields[plan.each]
    if not isinstance(items, list) or not items:
        raise RecordError(raw.source, plan.each, items, "a list of examples")
    return [record for item in items for record in _READ[kind](Example(raw, plan, fields | {plan.each: item}))]


def _check_nulls(raw: RawRecord) -> None:
    """Refuse a null in the place of what answers are compared by: without it the record would be another one."""
    for name, value in raw.fields.items():
        role = shapes.role_of(name)
        if value is None and role in shapes.ORDERS and raw.layout.options.columns.get(name) != "ignore":
            expected = f"what it says of the answers; leave it out with {in_columns({name: 'ignore'})}"
            raise RecordError(raw.source, name, value, expected)


def _check_understood(raw: RawRecord, plan: Plan, fields: dict[str, Any]) -> None:
    """Raise `RecordError` unless the fields make a shape, and all of them that have text are read or of no use."""
    if plan.problem:
        name, expected = plan.problem
        raise RecordError(raw.source, name, fields.get(name), expected, "unclear")
    unread = [name for name in plan.unknown if next(texts_in(fields[name], ()), None) is not None]
    if unread:
        raise RecordError(raw.source, unread[0], fields[unread[0]], help_for(*unread), "unclear")
    for name in plan.unknown:
        raw.layout.pass_over(name)
    for name in plan.inside:
        _check_inside(raw, plan, name, fields[name])
    if plan.shape is None:
        raise _no_shape(raw, plan, fields)


def _check_inside(raw: RawRecord, plan: Plan, name: str, value: Any) -> None:
    """Refuse texts of a field that `columns:`, or the table, takes only a part of."""
    known = [path for paths in plan.paths.values() for path in paths]
    for path in texts_in(value, (name,)):
        bare = tuple(step for i, step in enumerate(path) if i != 1 or name != plan.each)
        if any(bare[: len(its)] == its for its in known):
            continue
        if shapes.role_of(path[-1]) == "ignore" or shapes.is_speaker(path[-1]) or raw.layout.ignores(path):
            raw.layout.pass_over(shown(path))
        else:
            raise RecordError(raw.source, shown(path), Described("text"), help_for(shown(path)), "unclear")


def _no_shape(raw: RawRecord, plan: Plan, fields: dict[str, Any]) -> RecordError:
    near = shapes.nearest(frozenset(plan.paths))
    lacking = [role for role in near.needs.split() if role not in plan.paths] if near and plan.paths else []
    if near and len(lacking) == 1:
        its = f"{near.needs.replace(' ', ' + ')}, such as {shapes.names_of(lacking[0])}"
        return RecordError(raw.source, lacking[0], None, its)
    if extra := shapes.out_of_place(frozenset(plan.paths)):
        name, beside = shown(plan.paths[extra[0]][0]), extra[1].needs.replace(" ", " + ")
        expected = (
            f"no such field beside {beside}; leave it out with {in_columns({name: 'ignore'})} "
            f"({in_map({name: 'ignore'})})"
        )
        return RecordError(raw.source, name, fields.get(name), expected, "unclear")
    expected = "fields that make a record, such as prompt + completion, messages, or prompt + chosen + rejected; "
    expected += "say what is what with `columns: {NAME: prompt}` (`--map NAME=prompt`)"
    return RecordError(raw.source, "(whole record)", sorted(fields), expected)


# --- Kinds ----------------------------------------------------------------------------------------


def _sft(read: Example) -> list[Record]:
    shape, labels = read.shape, read.raw.layout.options.labels
    if shape.kind == "kto":
        field, value = read.get("label")
        if labels != "true_only":
            expected = "examples to learn from; of labelled ones, take the true: `labels: true_only`"
            raise read.error(field, value, f"{expected} (`--labels true_only`)", "unclear")
        labelled = _with_label(read)
        texts = (*labelled.history, labelled.prompt, labelled.completion)
        return [Dialogue(texts, labelled.system)] if labelled.label else []
    if shape.kind == "preference":
        expected = "an answer to learn from; this record compares some"
        if {"chosen", "rejected"} <= read.plan.paths.keys():
            good, bad = (shown(read.plan.paths[role][0]) for role in ("chosen", "rejected"))
            expected += f". To take one: {in_columns({good: 'completion', bad: 'ignore'})}"
        raise read.error("(whole record)", sorted(read.fields), expected)
    asked = read.asked()
    if shape.whole:
        if not asked.texts or len(asked.texts) % 2:
            found_turns = Described(f"{len(asked.texts)} turns")
            raise read.error("turns", found_turns, "an even number: user, assistant, user, ...")
        read.check_repeats(*asked.texts)
        return [Dialogue(asked.texts, asked.system)]
    if shape.kind == "prompt":
        raise read.error("completion", None, f"a non-empty string, such as {shapes.names_of('completion')}")
    if "completions" in read.plan.paths:
        _check_unordered(read)
    named = read.candidates() if "completions" in read.plan.paths else [read.get("completion")]
    asked, answers = read.answers(asked, named)
    _check_asks(read, asked)
    if len(answers) > 1:
        read.check_distinct(named, answers)
    if read.plan.repeats:
        read.check_repeats(*asked.texts, *answers)
    return [Dialogue((*asked.texts, answer), asked.system) for answer in answers]


def _check_unordered(read: Example) -> None:
    """Refuse several answers beside something that may say which of them is the better one."""
    columns = read.raw.layout.options.columns
    answers = {name: f"{name}." for name in read.plan.numbered} | {read.plan.listed or "": f"{read.plan.listed}[]."}
    beside: dict[str, Any] = {}
    for name, value in read.fields.items():
        if name in answers:
            items = value if isinstance(value, list) else [value]
            beside |= {f"{answers[name]}{k}": v for item in items if isinstance(item, dict) for k, v in item.items()}
        elif shapes.role_of(name) in (None, "ignore"):
            beside[name] = value
    for name, value in beside.items():
        counts = shapes.plain(name.rpartition(".")[2]) in shapes.COUNTERS
        numbers = value if isinstance(value, list) and value else [value]
        if not counts and columns.get(name) != "ignore" and all(isinstance(n, int | float) for n in numbers):
            expected = "no number that may say which answer is the better one; if it does, say so with "
            expected += f"{in_columns({name: 'scores'})}, and else {in_columns({name: 'ignore'})}"
            raise read.error(name, value, expected, "unclear")


def _preference(read: Example) -> list[Record]:
    if read.shape.kind == "kto":
        return [_with_label(read)]
    if read.shape.kind != "preference":
        expected = "answers to compare: prompt + chosen + rejected, or prompt + completion_0..k + ranking"
        raise read.error("(whole record)", sorted(read.fields), expected)
    asked, answers, tiers, ranking = read.compared()
    _check_asks(read, asked)
    if read.plan.repeats:
        read.check_repeats(*asked.texts, answers[tiers[0][0]])
    return [Ranking(asked.texts[-1], answers, tiers, asked.system, asked.texts[:-1], ranking)]


def _prompt(read: Example) -> list[Record]:
    """What is asked; of a dialogue that is answered to the end, its first question."""
    asked, paths = read.asked(), read.plan.paths
    if read.plan.asks == "prompt" and "chosen" in paths and isinstance(read.get("chosen")[1], list):
        asked, _ = read.answers(asked, [read.get("chosen")])  # which may tell what stands before the question
    elif read.plan.asks != "prompt":
        last_is_answer = "label" in paths and "completion" not in paths
        if last_is_answer or ("rejected" in paths and "chosen" not in paths):
            asked, _ = read.whole(read.get("messages")[0], asked)
        elif not read.plan.asks:
            pair = [read.get(role) for role in ("chosen", "rejected") if role in paths]
            asked, _ = read.answers(asked, pair or read.candidates())
        elif read.shape.whole and len(asked.texts) % 2 == 0:
            asked = Asked(asked.texts[:1], asked.system)
        _check_asks(read, asked)
    return [asked.prompt]


def _kto(read: Example) -> list[Record]:
    """An answer with its label; of a comparison, the best answers as true and the others as false."""
    if read.shape.kind == "preference":
        found: list[Record] = []
        for record in _preference(read):
            assert isinstance(record, Ranking)
            for rank, tier in enumerate(record.tiers):
                for i in tier:
                    answer = record.completions[i]
                    found.append(Labelled(record.prompt, answer, rank == 0, record.system, record.history))
        return found
    if read.shape.kind != "kto":
        raise read.error("label", None, f"true or false, under a name such as {shapes.names_of('label')}")
    return [_with_label(read)]


def _with_label(read: Example) -> Labelled:
    asked = read.asked()
    if "completion" in read.plan.paths:
        asked, (answer,) = read.answers(asked, [read.get("completion")])
    else:
        asked, answer = read.whole(read.get("messages")[0], asked)
    _check_asks(read, asked)
    read.check_repeats(*asked.texts, answer)
    return Labelled(asked.texts[-1], answer, read.label(), asked.system, asked.texts[:-1])


def _check_asks(read: Example, asked: Asked) -> None:
    if len(asked.texts) % 2 == 0:
        raise read.error("turns", Described(f"{len(asked.texts)} turns"), "turns that end with the user's")


_READ: dict[Kind, Callable[[Example], list[Record]]] = {
    "sft": _sft,
    "preference": _preference,
    "prompt": _prompt,
    "kto": _kto,
}
