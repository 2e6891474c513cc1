"""What people judge: prompts with two answers or more, shown blind and in an order of their own."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.reading import paired, read_parsed
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking, RecordError, Source
from kochat_trl.desk.curation.build import answers_in, gather_scores, read_prompts
from kochat_trl.errors import UserError

Scores = Mapping[str, Mapping[str, float]]  # a reward model's: id of an item → answer → score


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to it, in the order of the file."""

    prompt: Prompt
    answers: tuple[str, ...]

    @cached_property
    def id(self) -> str:
        """16 hex digits of SHA-256 over what is asked and the set of answers: the same in every file."""
        asked = [self.prompt.prompt, self.prompt.system or None, list(self.prompt.history)]
        content = json.dumps([*asked, sorted(set(self.answers))])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def shown_to(self, annotator: str, seed: int = 0) -> tuple[int, ...]:
        """The answers' indices as `annotator` sees them: drawn by the item, the annotator and the seed alone, so it
        says nothing of the file's order."""
        order = sorted(range(len(self.answers)), key=self.answers.__getitem__)
        random.Random(f"{seed}/{self.id}/{annotator}").shuffle(order)
        return tuple(order)


def read_items(
    files: Sequence[str], answers: Sequence[str] = (), *, options: ReadingOptions = DEFAULTS, skip_invalid: bool = False
) -> tuple[list[Item], list[RecordError], list[str]]:
    """The items of `files`, those that stand there twice once; the records that can't be used; and the prompts to which
    there are no two different answers.

    With `answers`, files with an answer to each prompt, these are the candidates; empty answers are left out, and equal
    ones are one. Without, each record has its own: a ranking or a pair, whose order is not shown, several answers
    without an order, or labelled answers to one prompt.

    Raises `BrokenRecordsError` for records that can't be used, unless `skip_invalid`; `UserError` if an answer file
    lacks a prompt, or if no item is left.
    """
    invalid: list[RecordError] = []
    if answers:
        found = []
        for file in files:
            prompts, broken = read_prompts(file, skip_invalid, options=options)
            invalid += broken
            by_source = [answers_in(source, prompts) for source in answers]
            found += [Item(*row) for row in zip(prompts, map(different, zip(*by_source, strict=True)), strict=True)]
    else:
        labelled: list[tuple[Source, Labelled]] = []
        found = []
        for source, record in read_parsed(_compared, files, invalid, options, skip_invalid):
            if isinstance(record, Labelled):
                labelled.append((source, record))
            else:
                found.append(record)
        found += [_item(ranking) for _, ranking in paired(labelled, invalid)]
    items: dict[str, Item] = {}
    for item in found:
        if len(item.answers) > 1:
            items.setdefault(item.id, item)
    if not items:
        raise UserError(f"{', '.join(files)}: no prompt has two different answers to judge")
    few = [item.prompt.prompt for item in found if len(item.answers) < 2]
    return list(items.values()), invalid, few


def _compared(raw: RawRecord) -> list[Item | Labelled]:
    kind = kind_of(raw)
    if kind == "prompt":
        expected = "several answers to compare, or files of answers beside this one: --answers A B"
        raise RecordError(raw.source, "completion", None, expected)
    if kind != "sft":
        records: Sequence[Any] = parse(raw, "preference")
        return [_item(record) if isinstance(record, Ranking) else record for record in records]
    answers: dict[Prompt, list[str]] = {}
    for dialogue in parse(raw, "sft"):
        assert isinstance(dialogue, Dialogue)
        *history, prompt, answer = dialogue.texts
        answers.setdefault(Prompt(prompt, dialogue.system, tuple(history)), []).append(answer)
    if single := next((prompt.prompt for prompt, its in answers.items() if len(its) < 2), None):
        expected = "several answers to it in one record; answers that are in files of their own are named by --answers"
        raise RecordError(raw.source, "prompt", single, expected)
    return [Item(prompt, tuple(its)) for prompt, its in answers.items()]


def _item(ranking: Ranking) -> Item:
    return Item(ranking.asked, ranking.completions)


def different(answers: Iterable[str]) -> tuple[str, ...]:
    """Those that are not empty, each once."""
    return tuple(dict.fromkeys(answer for answer in answers if answer.strip()))


def score_items(reward_model: str, items: Sequence[Item]) -> Scores:
    """What the reward model (adapter with its head, or merged) gives each answer. Raises as `gather_scores` does."""
    pairs = [(item, answer) for item in items for answer in item.answers]
    (scores,) = gather_scores(reward_model, [item.prompt for item, _ in pairs], [[answer for _, answer in pairs]])
    found: dict[str, dict[str, float]] = {}
    for (item, answer), score in zip(pairs, scores, strict=True):
        found.setdefault(item.id, {})[answer] = score
    return found
