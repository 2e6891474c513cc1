"""Files of rankings and answers → the scores that a reward model gives them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.reading import read_as, read_parsed
from kochat_trl.data.records import (
    BrokenRecordsError,
    Labelled,
    Messages,
    Prompt,
    Ranking,
    RecordError,
    Source,
    summarize,
)
from kochat_trl.desk.evaluation.metrics import ScoredAnswer, ScoredRanking
from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_config, positions_of
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import Loading, load_scorer, score_ids
from kochat_trl.rows.encode import encode_turns
from kochat_trl.rows.rows import DataReport, fitting, too_long
from kochat_trl.settings.keys import DataArguments

Rows = list[tuple[dict[str, Any], Messages]]  # what is written of an answer, and what is scored
_AS_TRAINED = DataArguments()


@dataclass(frozen=True)
class Text:
    """An answer as it is scored: its `ids` with the prompt's, of which `tokens` are its own; `row` is what it is, and
    `asked` all that stands before it, as one text."""

    row: dict[str, Any]  # prompt, system if there is one, completion, and of a ranking rank; or messages
    ids: list[int]
    tokens: int
    asked: str


def read_rankings(
    path: str, files: Sequence[str], options: DataArguments = _AS_TRAINED, max_length: int | None = None
) -> tuple[list[list[Text]], DataReport]:
    """The ranked answers of each ranking or pair of `files`, as the reward model `path` takes them, best first.

    Ranks count from 0 without gaps. A ranking in which fewer than two fit is left out. Texts of more than `max_length`
    tokens, or than the model has positions, are refused, cut as reward training cuts, or left out. Raises
    `BrokenRecordsError` for records that can't be read, unless the options say to skip them, and `UserError` if none is
    left.
    """
    report = DataReport()
    skip = options.invalid_records == "skip"
    records = read_as("preference", files, report.left_out, options=options, skip_invalid=skip)
    groups = [(source, [row for row in _rows(ranking) if row[0]["rank"] is not None]) for source, ranking in records]
    for _, rows in groups:
        rows.sort(key=lambda row: row[0]["rank"])
    found = _encode(path, files, groups, 2, report, options, max_length)
    for texts in found:
        ranks = sorted({text.row["rank"] for text in texts})
        for text in texts:
            text.row["rank"] = ranks.index(text.row["rank"])
    return found, report


def read_answers(
    path: str, file: str, options: DataArguments = _AS_TRAINED, max_length: int | None = None
) -> tuple[list[Text], DataReport]:
    """Every answer of the dialogues, rankings and labelled answers of `file`, each fitted by itself.

    Raises as `read_rankings` does.
    """
    report = DataReport()

    def read(raw: RawRecord) -> list[Any]:
        kind = kind_of(raw)
        return parse(raw, kind if kind in ("preference", "kto") else "sft")

    skip = options.invalid_records == "skip"
    records = list(read_parsed(read, [file], report.left_out, options, skip))
    groups = [(source, [row]) for source, record in records for row in _rows(record)]
    found = _encode(path, [file], groups, 1, report, options, max_length)
    return [text for texts in found for text in texts], report


def _rows(record: Any) -> Iterator[tuple[dict[str, Any], Messages]]:
    """The answers of a ranking or a dialogue."""
    if isinstance(record, Ranking):
        ranks = {i: rank for rank, tier in enumerate(record.tiers) for i in tier}
        for i, completion in enumerate(record.completions):
            yield record.asked.fields | {"completion": completion, "rank": ranks.get(i)}, record.messages(i)
    elif isinstance(record, Labelled):
        row = record.asked.fields | {"completion": record.completion, "label": record.label}
        yield row, record.messages
    elif len(record.texts) == 2:
        prompt, completion = record.texts
        yield Prompt(prompt, record.system).fields | {"completion": completion}, record.messages
    else:
        yield {"messages": record.messages}, record.messages


def _encode(
    path: str,
    files: Sequence[str],
    groups: Sequence[tuple[Source, Rows]],
    least: int,
    report: DataReport,
    options: DataArguments,
    max_length: int | None,
) -> list[list[Text]]:
    """The texts of each group of rows, best first, that has at least so many ranks when it fits."""
    if not groups:
        raise UserError(f"there is nothing to score in {', '.join(files)}\n{summarize(report.left_out)}".strip())
    limit = min(positions_of(load_config(path)) or sys.maxsize, max_length or sys.maxsize)
    encoded = iter(encode_turns(load_tokenizer(path), [messages for _, rows in groups for _, messages in rows]))
    found: list[list[Text]] = []
    refused: list[RecordError] = []
    for source, rows in groups:
        parts = [next(encoded) for _ in rows]
        all_ids = [list(chain(*its)) for its in parts]
        fit = fitting(all_ids, limit, options.overlong == "truncate")
        texts = []
        for i, ids in fit.items():
            row, messages = rows[i]
            asked = "\n".join(message["content"] for message in messages[:-1])
            texts.append(Text(row, ids, len(parts[i][-1]) - (len(all_ids[i]) - len(ids)), asked))
        usable = len({text.row.get("rank") for text in texts}) >= least and all(text.tokens > 0 for text in texts)
        found += [texts] if usable else []
        if (longest := max(map(len, all_ids))) > limit:
            error = too_long(source, longest, limit)
            (refused if options.overlong == "error" else report.in_part if usable else report.left_out).append(error)
    if refused:
        raise BrokenRecordsError(refused, len(groups))
    if not found:
        raise UserError(f"no text fits {limit} tokens")
    return found


def score_rankings(
    path: str, rankings: Sequence[Sequence[Text]], loading: Loading = "float32", batch_size: int = 64
) -> list[ScoredRanking]:
    """The ranked answers with their scores by the reward model `path`; each one is scored once, wherever it stands.

    Raises as `load_reward_model` and `score_ids` do.
    """
    scores = iter(_score(path, [text for texts in rankings for text in texts], loading, batch_size))
    found = []
    for texts in rankings:
        answers = [ScoredAnswer(text.row["completion"], text.row["rank"], text.tokens, next(scores)) for text in texts]
        found.append((texts[0].asked, answers))
    return found


def score_texts(
    path: str, texts: Sequence[Text], loading: Loading = "float32", batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """A row for each answer: `prompt`, `completion`, and `score`, which the reward model `path` gives it.

    An answer of a ranking has its `rank`, 0 for the best, None if it has none, a labelled one its `label`; one under a
    system message has that as `system`. A dialogue of several exchanges has `messages` for the first two.
    """
    for text, score in zip(texts, _score(path, texts, loading, batch_size), strict=True):
        rank = {"rank": text.row["rank"]} if "rank" in text.row else {}
        yield {key: text.row[key] for key in text.row if key != "rank"} | {"score": round(score, 6)} | rank


def _score(path: str, texts: Sequence[Text], loading: Loading, batch_size: int) -> list[float]:
    tokenizer = load_tokenizer(path)
    once = list(dict.fromkeys(tuple(text.ids) for text in texts))
    scores = score_ids(load_scorer(path, loading, tokenizer), tokenizer, [[*ids] for ids in once], batch_size)
    known = dict(zip(once, scores, strict=True))
    return [known[tuple(text.ids)] for text in texts]
