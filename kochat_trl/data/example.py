"""One example of a record: who asks what, what is answered, and in what order the answers stand.

Whatever the shape, an example is read in these three steps. Each raises a `RecordError` that names the file, the line,
the field, what was found and what was expected.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from kochat_trl.data import shapes
from kochat_trl.data.layout import Plan, RawRecord, shown, texts_in, value_at
from kochat_trl.data.rankings import Tiers, as_number, counted_from_0, ranking_tiers
from kochat_trl.data.records import Described, Fault, Prompt, RecordError, in_columns
from kochat_trl.data.shapes import Role, Shape

TURNS = ("user", "assistant")
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_JUDGED = ("model", "response", "answer", "completion", "conversation", "assistant")  # `winner: model_b`
_ITEM = re.compile(r", item \d+")  # as `candidates` names one of a list of answers
_TIES = ("tie", "draw", "both", "equal", "same")


class Asked(NamedTuple):
    """What an answer stands after: texts of the user and the assistant in turn."""

    texts: tuple[str, ...] = ()
    system: str | None = None

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.texts[-1], self.system, self.texts[:-1])


@dataclass(slots=True)
class Example:
    """One example of a record. What most records have is read first: there may be millions."""

    raw: RawRecord
    plan: Plan
    fields: dict[str, Any]

    @property
    def shape(self) -> Shape:
        return self.plan.shape  # type: ignore[return-value]  # a record of no shape is refused before

    def error(self, field: str, found: Any, expected: str, fault: Fault = "broken") -> RecordError:
        return RecordError(self.raw.source, field, found, expected, fault)

    def get(self, role: Role) -> tuple[str, Any]:
        """The name of the field that has a role, and what is in it."""
        if name := self.plan.plain.get(role):
            return name, self.fields[name]
        path = self.plan.path(role)
        return (shown(path), value_at(self.fields, path)) if path else (role, None)

    # --- Texts ------------------------------------------------------------------------------------

    def text(self, field: str, value: Any) -> str:
        """`value`, if it is a non-empty string that can be written as UTF-8; content parts are joined."""
        if isinstance(value, str) and value and not value.isspace() and (value.isascii() or _is_whole(value)):
            return value
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            value = self.parts(field, value)
            if isinstance(value, str):
                return self.text(field, value)
        if isinstance(value, dict) and (keys := self.message_keys(field, value))[1]:
            return self.text(field, value[keys[1]])
        if not isinstance(value, str) or not value.strip():
            blank = isinstance(value, str)
            expected = "a non-empty string"
            if isinstance(value, dict):
                expected += f"; a field of it is named `{field}.NAME` in `columns:`"
            raise self.error(field, value, expected, "empty" if blank else "broken")
        raise self.error(field, value, "text without half characters (\\ud800 to \\udfff)")

    def parts(self, field: str, value: list[dict[str, Any]]) -> Any:
        """The text of a list of content parts, `{type: text, text: …}`; `value` if it is something else."""
        if not all("type" in part for part in value):
            return value
        for part in value:
            if part["type"] != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
                raise self.error(field, part, "parts of text, {type: text, text: …}")
        return "".join(part["text"] for part in value)

    def optional(self, role: Role) -> str | None:
        """The text under a role that a record may have; None if it is blank."""
        if role not in self.plan.paths:
            return None
        field, value = self.get(role)
        return None if value is None or (isinstance(value, str) and not value.strip()) else self.text(field, value)

    def message_keys(self, field: str, message: dict[str, Any]) -> tuple[str | None, str | None]:
        """Under which keys a message has its speaker and its content. Text under any other key is refused."""
        keys = self.raw.layout.message_keys(tuple(message))
        column = _ITEM.sub("[]", field)
        for name in keys.others:
            said = shapes.role_of(name) != "ignore" and next(texts_in(message[name], ()), None) is not None
            if said and not self.raw.layout.ignores(tuple(f"{column}.{name}".replace("[]", ".[]").split("."))):
                expected = "a message of its speaker and its content alone; of anything else say what it is: "
                expected += in_columns({f"{column}.{name}": "ignore"})
                raise self.error(f"{field}.{name}", message[name], expected, "unclear")
            self.raw.layout.pass_over(f"{column}.{name}")
        return keys.speaker, keys.content

    # --- Dialogues --------------------------------------------------------------------------------

    def turns(self, field: str, value: Any) -> Asked:
        """Messages whose speakers take turns, the user first, after a system message if there is one."""
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise self.error(field, value, "a list of {role, content}")
        system: Any = None
        texts: list[str] = []
        for i, message in enumerate(value):
            speaker_key, content_key = self.message_keys(f"{field}[]", message)
            speaker = message[speaker_key] if speaker_key else None
            role = shapes.SPEAKER.get(str(speaker).lower())
            turn = f"turn {i - (system is not None)}"
            content = message[content_key] if content_key else None
            if i == 0 and role == "system":
                system = "" if content is None or content == "" else content
                continue
            if role != TURNS[len(texts) % 2]:
                raise self.error(turn, speaker, TURNS[len(texts) % 2])
            texts.append(self.text(turn, content))
        blank = system is None or (isinstance(system, str) and not system.strip())
        return Asked(tuple(texts), None if blank else self.text("system", system))

    def tagged(self, field: str, value: Any, waits: bool = False) -> Asked:
        """A dialogue in one text, told by the tags of its speakers; one that waits for an answer may end in its tag."""
        text = self.text(field, value)
        pieces = [(role, text[start:end]) for role, start, end in shapes.tagged_spans(text)]
        if len(pieces) > 1 and waits and pieces[-1][0] == "assistant" and not pieces[-1][1].strip():
            pieces.pop()
        if not pieces:
            tags = " or ".join(f"{user} … {assistant} …" for user, assistant, _ in shapes.TAGS)
            raise self.error(field, value, f"a dialogue such as {tags}")
        system: str | None = None
        texts: list[str] = []
        for i, (role, piece) in enumerate(pieces):
            if role == "system" and i == 0:
                system = piece.strip() or None
            elif role == "system" and len(texts) % 2:
                texts[-1] = "\n\n".join(filter(None, (texts[-1], piece.strip())))
            elif role == TURNS[len(texts) % 2]:
                texts.append(piece.strip())
            else:
                raise self.error(f"turn {len(texts)}", role, TURNS[len(texts) % 2])
        for i, text in enumerate(texts):
            self.text(f"turn {i}", text)
        return Asked(tuple(texts), system)

    def asked(self) -> Asked:
        """What stands before the answers; of a dialogue, all of it; nothing where only whole dialogues are compared."""
        bare = self.plan.bare
        if bare and isinstance(value := self.fields[bare], str) and not shapes.is_dialogue(value):
            return Asked((self.text(bare, value),))
        asked = Asked()
        if self.plan.asks:
            asked = _ASKED[self.plan.asks](self, *self.get(self.plan.asks))
        if "system" in self.plan.paths:
            asked = Asked(asked.texts, self.one_system(self.optional("system"), asked.system))
        return asked

    def prompt(self, field: str, value: Any) -> Asked:
        tagged = isinstance(value, str) and shapes.is_dialogue(value)
        if isinstance(value, list) or tagged:
            asked = self.tagged(field, value, waits=True) if tagged else self.turns(field, value)
            if len(asked.texts) % 2 == 0:
                raise self.error(field, Described(f"{len(asked.texts)} turns"), "turns that end with the user's")
        else:
            asked = Asked((self.text(field, value),))
        if context := self.optional("context"):
            asked = Asked((*asked.texts[:-1], f"{asked.texts[-1]}\n\n{context}"), asked.system)
        return Asked((*self.history(), *asked.texts), asked.system) if "history" in self.plan.paths else asked

    def history(self) -> Iterator[str]:
        """The exchanges before the question: [[question, answer], …], or messages."""
        field, value = self.get("history")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            before = self.turns(field, value).texts
            if len(before) % 2:
                raise self.error(field, Described(f"{len(before)} turns"), "messages that end with an answer")
            yield from before
            return
        if value is not None and not isinstance(value, list) and value != "":
            raise self.error(field, value, "a list of [question, answer]")
        for i, exchange in enumerate(value or ()):
            if not isinstance(exchange, list) or len(exchange) != 2:
                raise self.error(field, exchange, "[question, answer] for each exchange")
            yield from (self.text(f"{field}, exchange {i}", text) for text in exchange)

    def one_system(self, *found: str | None) -> str | None:
        given = list(dict.fromkeys(filter(None, found)))
        if len(given) > 1:
            raise self.error("system", given[1], "the system message that the messages begin with, or none")
        return given[0] if given else None

    # --- Answers ----------------------------------------------------------------------------------

    def answer(self, field: str, value: Any, alone: bool) -> tuple[Asked | None, str]:
        """An answer, and what it says that it stands after: None unless it is a whole dialogue."""
        if isinstance(value, dict):
            speaker = self.message_keys(field, value)[0]
            if speaker and shapes.SPEAKER.get(str(value[speaker]).lower()) != "assistant":
                raise self.error(field, value[speaker], "a message of the assistant's")
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            if isinstance(self.parts(field, value), str):
                return None, self.text(field, value)
            if len(value) == 1:
                return self.answer(field, value[0], alone)
            return self.whole(field, self.turns(field, value))
        elif isinstance(value, str) and (alone or shapes.is_dialogue(value)):
            return self.whole(field, self.tagged(field, value))
        return None, self.text(field, value)

    def whole(self, field: str, dialogue: Asked) -> tuple[Asked, str]:
        if not dialogue.texts or len(dialogue.texts) % 2:
            raise self.error(field, Described(f"{len(dialogue.texts)} turns"), "a dialogue that ends with an answer")
        return Asked(dialogue.texts[:-1], dialogue.system), dialogue.texts[-1]

    def answers(self, asked: Asked, named: Sequence[tuple[str, Any]]) -> tuple[Asked, tuple[str, ...]]:
        """The answers under some fields, and what they stand after: all the same, and `asked` if that is told too."""
        if asked.texts and all([isinstance(value, str) and value[:1] not in shapes.MAY_BEGIN for _, value in named]):
            return asked, tuple([self.text(field, value) for field, value in named])
        read = [(field, *self.answer(field, value, not asked.texts)) for field, value in named]
        for field, before, _ in read:
            if before is None:
                if not asked.texts:
                    raise self.error(field, Described("an answer alone"), "a prompt beside it, or a whole dialogue")
                continue
            system = self.one_system(asked.system, before.system)
            said = asked.texts and asked.texts != before.texts
            alone = len(asked.texts) == 1 and asked.texts[0].strip() in (
                before.texts[0].strip(),
                before.texts[-1].strip(),
            )
            if said and not alone:
                raise self.error(field, before.texts, "a dialogue with the prompt that stands beside it")
            asked = Asked(before.texts, system)
        return asked, tuple(text for _, _, text in read)

    def candidates(self) -> list[tuple[str, Any]]:
        """The fields of several answers, or the items of one."""
        paths = self.plan.paths["completions"]
        if self.plan.numbered:
            return [(name, self.fields[name]) for name in self.plan.numbered]
        if len(paths) > 1 or shapes.number_of(paths[0][-1]):
            return [(shown(path), value_at(self.fields, path)) for path in paths]
        field, value = self.get("completions")
        if not isinstance(value, list) or not value:
            raise self.error(field, value, "a list of answers")
        return [(f"{field}, item {i}", item) for i, item in enumerate(value)]

    def compared(self) -> tuple[Asked, tuple[str, ...], Tiers, Any]:
        """What is asked, the answers to it, their order, and KoChatGPT's `ranking` if that is what told it."""
        asked = self.asked()
        if "rejected" in self.plan.paths:
            pair = [self.get(role) for role in ("chosen", "rejected") if role in self.plan.paths]
            if len(pair) == 1:
                asked, chosen = self.whole(self.get("messages")[0], asked)
                _, (rejected,) = self.answers(asked, pair)
                answers: tuple[str, ...] = (chosen, rejected)
            else:
                asked, answers = self.answers(asked, pair)
            if answers[0] == answers[1]:
                raise self.error(pair[-1][0], answers[1], "a text that differs from the chosen one", "equal")
            return asked, answers, ((0,), (1,)), None
        named = self.candidates()
        if len(named) < 2:
            raise self.error("(whole record)", sorted(self.fields), "two answers at least")
        tiers, ranking = self.tiers([field for field, _ in named])
        asked, answers = self.answers(asked, named)
        self.check_distinct(named, answers)
        if len(tiers) < 2:
            field, value = self.get(self.ordered_by)
            raise self.error(field, value, "at least one answer that is better than another", "tied")
        return asked, answers, tiers, ranking

    def check_distinct(self, named: Sequence[tuple[str, Any]], answers: Sequence[str]) -> None:
        if len(set(answers)) < len(answers):
            i = next(i for i, text in enumerate(answers) if text in answers[:i])
            raise self.error(named[i][0], answers[i], "a text that no other answer has", "equal")

    @property
    def ordered_by(self) -> Role:
        return self.shape.needs.split()[-1]

    def tiers(self, names: list[str]) -> tuple[Tiers, Any]:
        """The order of the answers of these names, and a `ranking` counted from 0."""
        role, count = self.ordered_by, len(names)
        field, value = self.get(role)
        if role == "ranking":
            return self.ranking(field, value, count)
        if role == "winner":
            return self.verdict(field, value, names), None
        if len(self.plan.paths[role]) > 1:
            value = [value_at(self.fields, path) for path in self.plan.paths[role]]
        numbers = [*map(as_number, value)] if isinstance(value, list) else value
        if role == "ranks":
            try:
                return ranking_tiers(numbers, count, "rank_of"), None
            except ValueError as error:
                raise self.error(field, value, str(error)) from None
        if not isinstance(value, list) or len(value) != count or not all(map(_is_score, numbers)):
            raise self.error(field, value, f"the score of each of the {count} answers: {count} numbers or nulls")
        order = sorted((i for i in range(count) if numbers[i] is not None), key=lambda i: -numbers[i])
        return tuple(tuple(tier) for _, tier in groupby(order, lambda i: numbers[i])), None

    def ranking(self, field: str, value: Any, count: int) -> tuple[Tiers, Any]:
        order = self.raw.layout.options.ranking_order
        ranking, base = counted_from_0(value, count)
        if order == "best_first" and base is None and not self.plan.numbered:
            expected = f"numbers that tell whether they count from 0 or from 1: those of all {count} answers, or a 0"
            raise self.error(field, value, expected, "unclear")
        if order == "best_first" and self.plan.first == 1 and base != 1:
            expected = f"all numbers from 1 to {count}, as '{self.plan.numbered[0]}' is the first answer"
            raise self.error(field, value, expected, "unclear")
        try:
            tiers = ranking_tiers(ranking, count, order)
        except ValueError as error:
            raise self.error(field, value, str(error)) from None
        if order == "best_first" and (other := self.raw.layout.counts_otherwise(base or 0, self.raw.source)):
            expected = f"numbers from {1 - (base or 0)}, as in {other}"
            raise self.error(field, value, expected, "unclear")
        return tiers, ranking

    def verdict(self, field: str, value: Any, names: list[str]) -> Tiers:
        said = shapes.plain(str(value))
        if any(said.startswith(tie) for tie in _TIES):
            return (tuple(range(len(names))),)
        listed = not self.plan.numbered and len(self.plan.paths["completions"]) == 1  # a letter can't but count from a
        numbers = [
            chr(ord("a") + i) if listed else (shapes.number_of(name) or ("", ""))[1] for i, name in enumerate(names)
        ]
        fits = []
        for i, name in enumerate(names):
            known = (f"{stem}_{numbers[i]}" for stem in _JUDGED)
            if said in (shapes.plain(name), numbers[i], *known):
                fits.append(i)
        if len(fits) != 1:
            raise self.error(field, value, f"one of {', '.join(numbers if listed else names)}, or tie")
        return tuple(fits), tuple(i for i in range(len(names)) if i != fits[0])

    def label(self) -> bool:
        field, value = self.get("label")
        label = _TRUTHS.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
        if label is None:
            expected = f"true or false; if it is something else, leave it out: {in_columns({field: 'ignore'})}"
            raise self.error(field, value, expected, "unclear")
        return label

    def check_repeats(self, *texts: str) -> None:
        """Refuse a field beside the others that says something that they don't."""
        for role in self.plan.repeats:
            field, value = self.get(role)
            if role == "messages":
                said: Sequence[str] = self.turns(field, value).texts
                same = list(said) == list(texts)
            elif role == "text":
                same = isinstance(value, str) and all(
                    part.strip() in value for text in texts for part in text.split("\n\n")
                )
            else:
                said = self.prompt(field, value).texts
                same = said[-1] in texts
            if not same:
                expected = f"what the other fields say; leave it out, {in_columns({field: 'ignore'})}"
                raise self.error(field, value, expected, "unclear")


def _is_whole(text: str) -> bool:
    """Whether a text has no half characters: only JSON's escapes can tell them, and UTF-8 can't hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_ASKED = {"messages": Example.turns, "text": Example.tagged, "prompt": Example.prompt}


def _is_score(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)  # may have more digits than a float holds
    return value is None or whole or (isinstance(value, float) and math.isfinite(value))
