"""Files of rankings and answers → the scores that a reward model gives them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kochat_trl.data.rankings import RankingOrder
from kochat_trl.data.readers import read_parsed
from kochat_trl.data.records import Dialogue, Ranking, RecordError, kind_of, parse
from kochat_trl.desk.evaluation.metrics import ScoredAnswer, ScoredRanking
from kochat_trl.errors import UserError
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import Loading, load_scorer, score_dialogues, score_ids
from kochat_trl.rows.encode import IGNORED, conversation, encode_dialogues


def read_files(
    files: Sequence[str], read: Callable[[Any], Any], skip_invalid: bool
) -> tuple[list[Any], list[RecordError]]:
    """The records of `files` as `read` makes them of raw ones, and the errors of those that it can't.

    Raises `BrokenRecordsError` if there are errors, unless `skip_invalid`; `UserError` if no record is left.
    """
    invalid: list[RecordError] = []
    records = [record for _, record in read_parsed(files, read, invalid, skip_invalid)]
    if not records:
        raise UserError(f"there is nothing to score in {', '.join(files)}")
    return records, invalid


def read_rankings(
    files: Sequence[str], order: RankingOrder = "best_first", skip_invalid: bool = False
) -> tuple[list[Ranking], list[RecordError]]:
    """The rankings and pairs of `files`, and the records that are none. Raises as `read_files` does."""
    return read_files(files, lambda raw: parse(raw, "preference", order), skip_invalid)


def read_scorable(
    file: str, order: RankingOrder = "best_first", skip_invalid: bool = False
) -> tuple[list[Dialogue | Ranking], list[RecordError]]:
    """The dialogues and rankings of `file`, and the records that are neither. Raises as `read_files` does."""

    def read(raw: Any) -> Any:
        return parse(raw, "preference" if kind_of(raw) == "preference" else "sft", order)

    return read_files([file], read, skip_invalid)


def score_rankings(
    path: str, rankings: Sequence[Ranking], loading: Loading = "float32", batch_size: int = 64
) -> list[ScoredRanking]:
    """The ranked answers with their scores by the reward model `path`; each one is scored once, wherever it stands.

    Raises as `load_reward_model` and `score_ids` do.
    """
    tokenizer = load_tokenizer(path)
    ranked = [[(r.prompt, r.completions[i], rank) for rank, tier in enumerate(r.tiers) for i in tier] for r in rankings]
    texts = list(dict.fromkeys((prompt, text) for answers in ranked for prompt, text, _ in answers))
    encoded = encode_dialogues(tokenizer, [conversation(*text) for text in texts])
    scores = score_ids(load_scorer(path, loading, tokenizer), tokenizer, [ids for ids, _ in encoded], batch_size)
    tokens = (sum(label != IGNORED for label in labels) for _, labels in encoded)
    known = dict(zip(texts, zip(tokens, scores, strict=True), strict=True))
    return [(a[0][0], [ScoredAnswer(text, rank, *known[prompt, text]) for prompt, text, rank in a]) for a in ranked]


def score_records(
    path: str, records: Sequence[Dialogue | Ranking], loading: Loading = "float32", batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """A row for each answer: `prompt`, `completion`, and `score`, which the reward model `path` gives it.

    An answer of a ranking has its `rank`, 0 for the best, None if it has none. A dialogue of several exchanges has
    `messages` for the first two.
    """
    rows = [row for record in records for row in _rows(record)]
    tokenizer = load_tokenizer(path)
    dialogues = [row.get("messages") or conversation(row["prompt"], row["completion"]) for row in rows]
    scores = score_dialogues(load_scorer(path, loading, tokenizer), tokenizer, dialogues, batch_size)
    for row, score in zip(rows, scores, strict=True):
        rank = {"rank": row.pop("rank")} if "rank" in row else {}
        yield row | {"score": round(score, 6)} | rank


def _rows(record: Dialogue | Ranking) -> Iterator[dict[str, Any]]:
    if isinstance(record, Ranking):
        ranks = {i: rank for rank, tier in enumerate(record.tiers) for i in tier}
        for i, completion in enumerate(record.completions):
            yield {"prompt": record.prompt, "completion": completion, "rank": ranks.get(i)}
    elif len(record.messages) == 2:
        prompt, completion = (message["content"] for message in record.messages)
        yield {"prompt": prompt, "completion": completion}
    else:
        yield {"messages": record.messages}
