"""Records → the tokenized rows that TRL's trainers take.

Every row goes through the tokenizer's chat template, in all stages. The template's text is not tokenized
as a whole: a token could then fuse the end of the prompt with the start of the completion (kogpt2 has a token
for `:(`, so `응답):` + `(` does). `encode_after` joins token ids instead, so that the ids of a prompt are
always a prefix of the ids of prompt + completion, at training time as at inference.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from kochat_trl.data.rankings import Pairs, tier_pairs
from kochat_trl.data.reading import read_as
from kochat_trl.data.records import (
    BrokenRecordsError,
    Described,
    Dialogue,
    Labelled,
    Prompt,
    Ranking,
    Record,
    RecordError,
    Source,
    summarize,
)
from kochat_trl.data.shapes import Kind
from kochat_trl.errors import UserError
from kochat_trl.files import full_disk_told
from kochat_trl.models import template
from kochat_trl.rows.encode import IGNORED, encode_dialogues, encode_prompts, encode_turns, shorten_prompt
from kochat_trl.settings.keys import DataArguments, Stage
from kochat_trl.settings.parse import Arguments

from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KINDS: dict[Stage, Kind] = {"sft": "sft", "reward": "preference", "ppo": "prompt", "dpo": "preference", "kto": "kto"}
BATCH = 500  # records that are tokenized together


@dataclass
class DataReport:
    """The records that did not become rows as they are."""

    left_out: list[RecordError] = field(default_factory=list)
    in_part: list[RecordError] = field(default_factory=list)  # cut, or a ranking without its longest completions

    def __str__(self) -> str:
        """A line for each record; empty if there is none."""
        lines = [f"left out: {error}\n" for error in self.left_out]
        return "".join(lines + [f"kept in part: {error}\n" for error in self.in_part])


def build_datasets(
    stage: Stage, args: Arguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None, DataReport]:
    """`build_dataset` for the training files of a config and, if there are any, its held-out files."""
    recipe = args.recipe
    train_dataset, report = build_dataset(recipe.train_files, stage, tokenizer, args.max_length, recipe)
    if not recipe.eval_files:
        return train_dataset, None, report
    eval_dataset, more = build_dataset(recipe.eval_files, stage, tokenizer, args.max_length, recipe)
    return train_dataset, eval_dataset, DataReport(report.left_out + more.left_out, report.in_part + more.in_part)


def build_dataset(
    files: Sequence[str],
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    options: DataArguments | None = None,
) -> tuple[Dataset, DataReport]:
    """Read `files` into the tokenized dataset of a stage, and what became of the records that don't fit.

    A record is one row, and one for each of its examples. Columns: `input_ids`, `labels` (SFT); `completion_ids`, the
    ids of prompt + completion for each ranked completion, `prompt_tokens`, how many of those are the prompt's, `ranks`,
    0 for the best and equal for a tie, and `length`, the longest of them (reward); `input_ids` (PPO); for each of the
    `pairs` of a ranking `prompt_ids`, `chosen_ids`, `rejected_ids` and `length` (DPO); `prompt_ids`, `completion_ids`,
    `label` and `length` (KTO). `max_length` counts the tokens of a sequence.

    Tokenized rows are cached on disk by `datasets`, under a hash of the records, the tokenizer and this module.

    Raises `BrokenRecordsError` if a record is invalid or too long and the options don't say what to do with it, and
    `UserError` if no row is left.
    """
    options = options or DataArguments()
    kind, report = KINDS[stage], DataReport()
    skip = options.invalid_records == "skip"
    parsed = list(read_as(kind, files, report.left_out, options=options, skip_invalid=skip))
    records: list[Record] = [record for _, record in parsed]
    if not records:
        raise UserError(f"no {kind} record in {', '.join(files)}\n{summarize(report.left_out)}".strip())

    dataset = _tokenize(records, stage, tokenizer, max_length, options.overlong)
    usable = list(dataset["usable"])
    overlong = [
        (i, too_long(parsed[i][0], n, max_length))
        for i, n in enumerate(dataset["tokens"])
        if max_length is not None and n > max_length
    ]
    if overlong and options.overlong == "error":
        raise BrokenRecordsError([error for _, error in overlong], len(records))
    for i, error in overlong:
        (report.in_part if usable[i] else report.left_out).append(error)
    if report.left_out:
        logger.warning("%d records were left out:\n%s", len(report.left_out), summarize(report.left_out))
    if report.in_part:
        logger.warning("%d records were kept in part:\n%s", len(report.in_part), summarize(report.in_part))
    if not any(usable):
        raise UserError(f"no {kind} record of {', '.join(files)} fits max_length")
    if not all(usable):
        dataset = dataset.select([i for i, use in enumerate(usable) if use])
    dataset = dataset.remove_columns(["tokens", "usable"])
    if stage == "dpo":
        with full_disk_told(HF_DATASETS_CACHE):
            make = partial(_pair_rows, pairs=options.pairs)
            dataset = dataset.map(make, batched=True, remove_columns=dataset.column_names, desc="Pairing")
    logger.info("%s: %d rows from %s", stage, len(dataset), ", ".join(files))
    return dataset, report


def _tokenize(
    records: Sequence[Record], stage: Stage, tokenizer: PreTrainedTokenizerBase, max_length: int | None, overlong: str
) -> Dataset:
    """A row for each record, with what is too long cut or dropped if `overlong` says so.

    Beside the columns that are trained on: `tokens`, the length before that; and `usable`, false where nothing is left
    to learn from.
    """
    limit = sys.maxsize if max_length is None or overlong == "error" else max_length

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(records), BATCH):
            batch: Any = records[start : start + BATCH]
            yield from _ROWS[stage](tokenizer, batch, limit, overlong == "truncate")

    key = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(template.__file__)):  # what makes a row of a record
        key.update(file.read_bytes())
    state = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map
    for part in (stage, limit, overlong, state, *records):
        key.update(repr(part).encode("utf-8", "surrogatepass"))
    try:
        with full_disk_told(HF_DATASETS_CACHE):
            return Dataset.from_generator(rows, fingerprint=key.hexdigest()[:32])
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None


def _sft_rows(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Dialogue], limit: int, cut: bool
) -> Iterator[dict[str, Any]]:
    for ids, labels in encode_dialogues(tokenizer, [record.messages for record in batch]):
        tokens = len(ids)
        if cut:
            ids, labels = ids[:limit], labels[:limit]
        usable = len(ids) <= limit and any(label != IGNORED for label in labels)
        yield {"input_ids": ids, "labels": labels, "tokens": tokens, "usable": usable}


def _ranking_rows(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Ranking], limit: int, cut: bool
) -> Iterator[dict[str, Any]]:
    ranked = [[(rank, i) for rank, tier in enumerate(r.tiers) for i in tier] for r in batch]
    dialogues = [r.messages(place) for r, answers in zip(batch, ranked, strict=True) for _, place in answers]
    encoded = iter(encode_turns(tokenizer, dialogues))
    for answers in ranked:
        turns = [next(encoded) for _ in answers]
        completions = [list(chain(*parts)) for parts in turns]
        kept = fitting(completions, limit, cut)
        ranks = sorted({answers[place][0] for place in kept})
        yield {
            "completion_ids": [*kept.values()],
            "prompt_tokens": len(completions[0]) - len(turns[0][-1]),
            "ranks": [ranks.index(answers[place][0]) for place in kept],
            "length": max(map(len, kept.values()), default=0),
            "tokens": max(map(len, completions)),
            "usable": len(ranks) > 1,
        }


def _pair_rows(rows: dict[str, list[Any]], pairs: Pairs) -> dict[str, list[Any]]:
    """Columns of `_ranking_rows` → those of a row for each pair."""
    found: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "length": []}
    for completions, ranks, start in zip(rows["completion_ids"], rows["ranks"], rows["prompt_tokens"], strict=True):
        tiers = tuple(tuple(i for i, its in enumerate(ranks) if its == rank) for rank in sorted(set(ranks)))
        for better, worse, _ in tier_pairs(tiers, pairs):
            chosen, rejected = completions[better], completions[worse]
            row = (chosen[:start], chosen[start:], rejected[start:], max(len(chosen), len(rejected)))
            for column, value in zip(found.values(), row, strict=True):
                column.append(value)
    return found


def _labelled_rows(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Labelled], limit: int, cut: bool
) -> Iterator[dict[str, Any]]:
    for record, (*parts, answer) in zip(batch, encode_turns(tokenizer, [r.messages for r in batch]), strict=True):
        prompt = list(chain(*parts))
        tokens = len(prompt) + len(answer)
        if cut:
            answer = answer[: max(0, limit - len(prompt))]
        length = len(prompt) + len(answer)
        row = {"prompt_ids": prompt, "completion_ids": answer, "label": record.label, "length": length}
        yield row | {"tokens": tokens, "usable": length <= limit and bool(answer)}


def fitting(completions: Sequence[list[int]], limit: int, cut: bool) -> dict[int, list[int]]:
    """The ids of a ranking's completions, best first, of which a limit of tokens leaves something, by their places.

    With `cut`, what that has made equal is kept once, with the best rank.
    """
    if cut and max(map(len, completions)) > limit:
        alike = {tuple(ids[:limit]): place for place, ids in reversed([*enumerate(completions)])}
        return {place: list(ids) for ids, place in reversed(alike.items())}
    return {place: ids for place, ids in enumerate(completions) if len(ids) <= limit}


def too_long(source: Source, tokens: int, limit: int) -> RecordError:
    """The error of a record that has more tokens than may be."""
    return RecordError(source, "(whole record)", Described(f"{tokens} tokens"), f"at most {limit} tokens", "overlong")


def _prompt_rows(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Prompt], limit: int, cut: bool
) -> Iterator[dict[str, Any]]:
    for record, ids in zip(batch, encode_prompts(tokenizer, [record.messages for record in batch]), strict=True):
        tokens = len(ids)
        if cut and tokens > limit:
            ids = shorten_prompt(tokenizer, record.messages, limit)
        yield {"input_ids": ids, "tokens": tokens, "usable": 0 < len(ids) <= limit}


_ROWS: dict[Stage, Any] = {"sft": _sft_rows, "reward": _ranking_rows, "ppo": _prompt_rows}
_ROWS |= {"dpo": _ranking_rows, "kto": _labelled_rows}
