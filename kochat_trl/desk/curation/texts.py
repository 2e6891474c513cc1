"""The texts of a raw record, wherever its layout has them: what `kochat data check` looks at, and `clean` mends."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.layout import RawRecord

Place = tuple[str | int, ...]  # the way to a text: names of fields, indices of items, and "#" with a piece of a text
PROMPTS, ANSWERS, SYSTEMS = ROLES = ("prompts", "answers", "system messages")
_ROLE_OF = {"prompt": PROMPTS, "context": PROMPTS, "system": SYSTEMS, "completion": ANSWERS, "completions": ANSWERS}
_ROLE_OF |= {"chosen": ANSWERS, "rejected": ANSWERS, "messages": "", "text": "", "history": ""}  # told by who speaks
_SPEAKER = {"user": PROMPTS, "assistant": ANSWERS, "system": SYSTEMS}


def texts(raw: RawRecord, repeated: bool = False) -> dict[Place, tuple[str, str]]:
    """Place → what it is, one of `ROLES`, and the text. Fields that nothing reads are left out, and so are those that
    only say again what others say, unless `repeated`.

    An answer is something that the model is to say, or to judge.
    """
    if not isinstance(raw.fields, dict):
        return {}
    plan = raw.layout.plan(raw.known_fields())
    found: dict[Place, tuple[str, str]] = {}
    repeats = {"text"} & set(plan.repeats) if repeated else plan.repeats
    asked = {"prompt", "messages", "text"} & plan.paths.keys() - set(plan.repeats)
    for role, paths in plan.paths.items():
        if role in _ROLE_OF and role not in repeats:
            tagged = role == "text" or (_ROLE_OF[role] == ANSWERS and not asked)
            for path in paths:
                steps = (path[0], "[]", *path[1:]) if plan.each == path[0] else path
                for place, value in _places(raw.fields, steps):
                    found |= {(*place, *rest): its for rest, its in _leaves(raw, value, role, tagged)}
    return found


def mended(raw: RawRecord, new: Mapping[Place, str]) -> RawRecord:
    """`raw` with the texts in `new` put in place, and in a field that repeats them, too."""
    fields = with_texts(raw.fields, new)
    plan = raw.layout.plan(raw.known_fields())
    name = plan.plain.get("text")
    if name and "text" in plan.repeats and isinstance(raw.fields[name], str):
        for place, (_, text) in texts(raw).items():
            if text.strip() and new.get(place, text) != text:
                fields[name] = fields[name].replace(text.strip(), new[place].strip())
    return replace(raw, fields=fields)


def with_texts(fields: Any, new: Mapping[Place, str]) -> Any:
    """`fields` with the texts in `new` put in place; `fields` stays as it is."""
    if () in new:
        return new[()]
    inner: dict[Any, dict[Place, str]] = {}
    for place, text in new.items():
        inner.setdefault(place[0], {})[place[1:]] = text
    if "#" in inner and isinstance(fields, str):
        pieces = _pieces(fields)
        for (i,), text in inner["#"].items():
            pieces[int(i)] = text
        return "".join(pieces)
    copy = dict(fields) if isinstance(fields, dict) else list(fields)
    for step, its in inner.items():
        copy[step] = with_texts(copy[step], its)
    return copy


def _places(value: Any, path: tuple[str, ...]) -> Iterator[tuple[Place, Any]]:
    """What is at the end of `path`, with each index that "[]" stands for."""
    if not path:
        yield (), value
    elif path[0] == "[]" and isinstance(value, list):
        for i, item in enumerate(value):
            yield from (((i, *place), inner) for place, inner in _places(item, path[1:]))
    elif isinstance(value, dict) and path[0] in value:
        yield from (((path[0], *place), inner) for place, inner in _places(value[path[0]], path[1:]))


def _leaves(raw: RawRecord, value: Any, role: str, tagged: bool) -> Iterator[tuple[Place, tuple[str, str]]]:
    """The texts in what stands under a role; a text may be a dialogue with tags if it is read as one."""
    told = _ROLE_OF[role]
    if isinstance(value, str):
        pieces = _pieces(value) if tagged or shapes.is_dialogue(value) else []
        if len(pieces) > 1:
            for i, (speaker, start, end) in enumerate(shapes.tagged_spans(value)):
                if role != "text" and not value[start:end].strip():
                    continue  # the tag of the answer that a prompt waits for
                yield ("#", 2 * i + 1), (_SPEAKER[speaker], pieces[2 * i + 1])
        else:
            yield (), (told or PROMPTS, value)
    elif isinstance(value, dict):
        keys = raw.layout.message_keys(tuple(value))
        if keys.content:
            said = shapes.SPEAKER.get(str(value.get(keys.speaker or "")).lower())
            own = _SPEAKER[said] if said else told or PROMPTS
            content = value[keys.content]
            inner = [((), content)] if isinstance(content, str) else _parts(content)
            yield from (((keys.content, *place), (own, text)) for place, text in inner)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, list) and role == "history":
                for j, text in enumerate(item):
                    if isinstance(text, str):
                        yield (i, j), (ANSWERS if j % 2 else PROMPTS, text)
            else:
                yield from (((i, *place), its) for place, its in _leaves(raw, item, role, tagged))


def _parts(content: Any) -> list[tuple[Place, str]]:
    """The texts of content parts."""
    items = enumerate(content) if isinstance(content, list) else ()
    return [
        ((i, "text"), part["text"]) for i, part in items if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]


def _pieces(text: str) -> list[str]:
    """A dialogue in one text as tag, text, tag, text, …, the blanks around a text with its tags; of any other text,
    itself alone.
    """
    pieces, last = [], 0
    for _, start, end in shapes.tagged_spans(text):
        said = text[start:end].strip()
        begin = text.index(said, start)
        pieces += [text[last:begin], said]
        last = begin + len(said)
    return [*pieces, text[last:]] if pieces else [text]
