"""Files of rankings and answers → the scores that a reward model gives them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kochat_trl.data.rankings import RankingOrder
from kochat_trl.data.readers import read_parsed
from kochat_trl.data.records import (
    BrokenRecordsError,
    Prompt,
    Ranking,
    RawRecord,
    RecordError,
    Source,
    conversation,
    kind_of,
    parse,
)
from kochat_trl.desk.evaluation.metrics import ScoredAnswer, ScoredRanking
from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_config, positions_of
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import Loading, load_scorer, score_ids
from kochat_trl.rows.encode import IGNORED, encode_dialogues
from kochat_trl.rows.rows import DataReport, fitting, too_long


@dataclass(frozen=True)
class Reading:
    """How files are read. Texts of more than `max_length` tokens, or than the model has positions, are refused, cut as
    reward training cuts, or left out.
    """

    order: RankingOrder = "best_first"
    skip_invalid: bool = False
    overlong: Literal["error", "truncate", "drop"] = "error"
    max_length: int | None = None


@dataclass(frozen=True)
class Text:
    """An answer as it is scored: its `ids` with the prompt's, of which `tokens` are its own; `row` is what it is."""

    row: dict[str, Any]  # prompt, system if there is one, completion, and of a ranking rank; or messages
    ids: list[int]
    tokens: int


def read_rankings(path: str, files: Sequence[str], reading: Reading = Reading()) -> tuple[list[list[Text]], DataReport]:
    """The ranked answers of each ranking or pair of `files`, as the reward model `path` takes them, best first.

    Ranks count from 0 without gaps. A ranking in which fewer than two fit is left out. Raises as `_read` does.
    """
    records, report = _read(files, lambda raw: parse(raw, "preference", reading.order), reading.skip_invalid)
    groups = [(source, [row for row in _rows(ranking) if row["rank"] is not None]) for source, ranking in records]
    for _, rows in groups:
        rows.sort(key=lambda row: row["rank"])
    found = _encode(path, groups, 2, report, reading)
    for texts in found:
        ranks = sorted({text.row["rank"] for text in texts})
        for text in texts:
            text.row["rank"] = ranks.index(text.row["rank"])
    return found, report


def read_answers(path: str, file: str, reading: Reading = Reading()) -> tuple[list[Text], DataReport]:
    """Every answer of the dialogues and rankings of `file`, each fitted by itself. Raises as `_read` does."""

    def read(raw: RawRecord) -> Any:
        return parse(raw, "preference" if kind_of(raw) == "preference" else "sft", reading.order)

    records, report = _read([file], read, reading.skip_invalid)
    groups = [(source, [row]) for source, record in records for row in _rows(record)]
    return [text for texts in _encode(path, groups, 1, report, reading) for text in texts], report


def _read(files: Sequence[str], read: Callable[[RawRecord], Any], skip_invalid: bool) -> tuple[list[Any], DataReport]:
    """Raises `BrokenRecordsError` if `read` can't read some, unless `skip_invalid`; `UserError` if none is left."""
    report = DataReport()
    records = list(read_parsed(files, read, report.left_out, skip_invalid))  # each with its source
    if not records:
        raise UserError(f"there is nothing to score in {', '.join(files)}")
    return records, report


def _rows(record: Any) -> Iterator[dict[str, Any]]:
    """The answers of a ranking or a dialogue."""
    if isinstance(record, Ranking):
        ranks = {i: rank for rank, tier in enumerate(record.tiers) for i in tier}
        for i, completion in enumerate(record.completions):
            prompt = Prompt(record.prompt, record.system)
            yield prompt.fields | {"completion": completion, "rank": ranks.get(i)}
    elif len(record.texts) == 2:
        prompt, completion = record.texts
        yield Prompt(prompt, record.system).fields | {"completion": completion}
    else:
        yield {"messages": record.messages}


def _encode(
    path: str, groups: Sequence[tuple[Source, list[dict[str, Any]]]], least: int, report: DataReport, reading: Reading
) -> list[list[Text]]:
    """The texts of each group of rows, best first, that has at least so many ranks when it fits."""
    limit = min(positions_of(load_config(path)) or sys.maxsize, reading.max_length or sys.maxsize)
    dialogues = [
        row.get("messages") or conversation(row["prompt"], row["completion"], system=row.get("system"))
        for _, rows in groups
        for row in rows
    ]
    encoded = iter(encode_dialogues(load_tokenizer(path), dialogues))
    found: list[list[Text]] = []
    refused: list[RecordError] = []
    for source, rows in groups:
        all_ids, all_labels = zip(*(next(encoded) for _ in rows), strict=True)
        fit = fitting(all_ids, limit, reading.overlong == "truncate")
        texts = [Text(rows[i], ids, sum(x != IGNORED for x in all_labels[i][: len(ids)])) for i, ids in fit.items()]
        usable = len({text.row.get("rank") for text in texts}) >= least and all(text.tokens for text in texts)
        found += [texts] if usable else []
        if (longest := max(map(len, all_ids))) > limit:
            error = too_long(source, longest, limit)
            (refused if reading.overlong == "error" else report.in_part if usable else report.left_out).append(error)
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
        found.append((texts[0].row["prompt"], answers))
    return found


def score_texts(
    path: str, texts: Sequence[Text], loading: Loading = "float32", batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """A row for each answer: `prompt`, `completion`, and `score`, which the reward model `path` gives it.

    An answer of a ranking has its `rank`, 0 for the best, None if it has none; one under a system message has that as
    `system`. A dialogue of several exchanges has `messages` for the first two.
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
