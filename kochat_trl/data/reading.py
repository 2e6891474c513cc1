"""Files → records of one kind, each with where it came from: what recipes and commands read with."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from kochat_trl.data.layout import Layout, RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.parse import parse
from kochat_trl.data.readers import read_records
from kochat_trl.data.records import BrokenRecordsError, Labelled, Prompt, Ranking, RecordError, Source, clipped
from kochat_trl.data.shapes import Kind
from kochat_trl.errors import UserError, nearest

from tqdm import tqdm

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


def read_as(
    kind: Kind,
    files: Sequence[str],
    invalid: list[RecordError],
    *,
    options: ReadingOptions = DEFAULTS,
    skip_invalid: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[Source, Any]]:
    """Yield the records of `kind` that the first `limit` raw ones of `files` hold, and where each came from.

    For preference, labelled answers are put together at the end: see `paired`. Raises as `read_parsed` does.
    """
    waiting: list[tuple[Source, Labelled]] = []
    found = read_parsed(lambda raw: parse(raw, kind), files, invalid, options, skip_invalid, limit)
    for source, record in found:
        if kind == "preference" and isinstance(record, Labelled):
            waiting.append((source, record))
        else:
            yield source, record
    yield from paired(waiting, invalid)


def read_parsed(
    parse: Callable[[RawRecord], Sequence[Parsed]],
    files: Sequence[str],
    invalid: list[RecordError],
    options: ReadingOptions = DEFAULTS,
    skip_invalid: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[Source, Parsed]]:
    """Yield all that `parse` makes of each of the first `limit` records of `files`, and where it came from.

    The errors of those that it raises a `RecordError` for are added to `invalid`. All files are read before it raises
    `BrokenRecordsError` for them, so that a person sees all that is wrong; it doesn't if `skip_invalid`. Raises
    `UserError` if no record has one of the columns that `options` names. What nothing reads is logged once a file.
    """
    raws = (raw for file in files for raw in tqdm(read_records(file, options), f"Reading {file}", delay=2, leave=False))
    layouts: dict[int, tuple[str, Layout]] = {}
    read = 0
    for raw in islice(raws, limit):
        read += 1
        layouts.setdefault(id(raw.layout), (raw.source.file, raw.layout))
        try:
            parsed = parse(raw)
        except RecordError as error:
            invalid.append(error)
        else:
            yield from ((raw.source, one) for one in parsed)
    if limit is None or read < limit:
        check_columns([layout for _, layout in layouts.values()])
    for file, layout in layouts.values():
        if layout.passed_over:
            logger.info("%s: not read: %s", file, ", ".join(map(clipped, layout.passed_over)))
    if invalid and not skip_invalid:
        raise BrokenRecordsError(invalid, read)


def check_columns(layouts: Sequence[Layout]) -> None:
    """Raise `UserError` for a column of `columns:` that no file has."""
    unseen = set.intersection(*(layout.unseen for layout in layouts)) if layouts else set()
    names = dict.fromkeys(name for layout in layouts for name in layout.names)
    for column in sorted(unseen):
        known = nearest(column, set(names), ".")
        raise UserError(f"columns: there is no column '{column}'{known} There are: {', '.join(map(clipped, names))}")


def paired(labelled: Sequence[tuple[Source, Labelled]], invalid: list[RecordError]) -> Iterator[tuple[Source, Ranking]]:
    """Rankings of the labelled answers to one prompt, the true ones above the false; a prompt that has only one kind
    gives none, and its answers are added to `invalid`. A ranking comes from where its first answer does.
    """
    groups: dict[Prompt, list[tuple[Source, Labelled]]] = {}
    for source, record in labelled:
        groups.setdefault(record.asked, []).append((source, record))
    for asked, its in groups.items():
        labels: dict[str, set[bool]] = {}
        for _, record in its:
            labels.setdefault(record.completion, set()).add(record.label)
        answers = [answer for answer, own in labels.items() if len(own) == 1]
        tiers = tuple(tuple(i for i, answer in enumerate(answers) if want in labels[answer]) for want in (True, False))
        if all(tiers):
            yield its[0][0], Ranking(asked.prompt, tuple(answers), tiers, asked.system, asked.history)
        for source, record in its:
            if record.completion not in answers:
                expected = "the label that the same answer has elsewhere"
            elif not all(tiers):
                expected = f"an answer labelled {str(not record.label).lower()} to the same prompt, to compare it with"
            else:
                continue
            invalid.append(RecordError(source, "label", record.label, expected, "unpaired"))
