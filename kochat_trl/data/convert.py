"""Records → the tokenized rows that TRL's trainers take.

Every row goes through the tokenizer's chat template, in all three stages. The template's text is not tokenized
as a whole: a token could then fuse the end of the prompt with the start of the completion (kogpt2 has a token
for `:(`, so `응답):` + `(` does). `encode_after` joins token ids instead, so that the ids of a prompt are
always a prefix of the ids of prompt + completion, at training time as at inference.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .readers import read_records
from .records import (
    BrokenRecordsError,
    Dialogue,
    Preference,
    Prompt,
    RawRecord,
    RecordError,
    parse_preference,
    parse_prompt,
    parse_sft,
)

logger = logging.getLogger(__name__)

Stage = Literal["sft", "reward", "ppo"]
Messages = Sequence[dict[str, str]]
IGNORED = -100  # the label that cross-entropy leaves out


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool = False) -> str:
    """The template's text of `messages`; with `prompt`, up to where the assistant's answer starts."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def encode_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """The ids of `text` as they stand right after `before`, without fusing across the boundary.

    `before` is empty for the start of a sequence. Where tokenizing the joined text would fuse, the ids are taken
    after a full stop instead, which keeps the completion from being read as the start of a sequence.
    """
    for anchor in (before, "."):
        anchor_ids = tokenizer.encode(anchor, add_special_tokens=False)
        joined_ids = tokenizer.encode(anchor + text, add_special_tokens=False)
        if joined_ids[: len(anchor_ids)] == anchor_ids:
            return joined_ids[len(anchor_ids) :]
    raise UserError(f"the tokenizer fuses {text[:40]!r} with any text before it; use another template")


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[int]]:
    """`(input_ids, labels)` of a dialogue, both of length (sequence,).

    Labels are the ids on every assistant turn, its end-of-turn token included, and −100 elsewhere.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    text = ""
    for end in range(2, len(messages) + 1, 2):
        prompt_text = render(tokenizer, messages[: end - 1], prompt=True)
        full_text = render(tokenizer, messages[:end])
        if not (prompt_text.startswith(text) and full_text.startswith(prompt_text)):
            raise UserError(
                "the chat template rewrites earlier turns when a turn is added, so a dialogue has no fixed "
                "ids; use a template that only appends"
            )
        prompt_ids = encode_after(tokenizer, text, prompt_text[len(text) :])
        answer_ids = encode_after(tokenizer, prompt_text, full_text[len(prompt_text) :])
        input_ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
        text = full_text
    return input_ids, labels


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids that a policy is given to answer `prompt`."""
    text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
    return encode_after(tokenizer, "", text)


def _sft_row(tokenizer: PreTrainedTokenizerBase, record: Dialogue) -> dict[str, list[int]]:
    input_ids, labels = encode_dialogue(tokenizer, record.messages)
    return {"input_ids": input_ids, "labels": labels}


def _preference_row(tokenizer: PreTrainedTokenizerBase, record: Preference) -> dict[str, list[int]]:
    def ids(completion: str) -> list[int]:
        turns = (
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": completion},
        )
        return encode_dialogue(tokenizer, turns)[0]

    return {"chosen_ids": ids(record.chosen), "rejected_ids": ids(record.rejected)}


def _prompt_row(tokenizer: PreTrainedTokenizerBase, record: Prompt) -> dict[str, list[int]]:
    return {"input_ids": encode_prompt(tokenizer, record.prompt)}


@dataclass(frozen=True)
class _Adapter:
    parse: Callable[[RawRecord], Sequence[Any]]
    row: Callable[[PreTrainedTokenizerBase, Any], dict[str, list[int]]]


ADAPTERS: dict[Stage, _Adapter] = {
    "sft": _Adapter(parse_sft, _sft_row),
    "reward": _Adapter(parse_preference, _preference_row),
    "ppo": _Adapter(parse_prompt, _prompt_row),
}


def build_datasets(
    train_files: Sequence[str],
    eval_files: Sequence[str],
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    skip_invalid: bool = False,
) -> tuple[Dataset, Dataset | None, list[RecordError]]:
    """`build_dataset` for training and, if there are any, held-out files."""
    settings = (stage, tokenizer, max_length, skip_invalid)
    train_dataset, left_out = build_dataset(train_files, *settings)
    if not eval_files:
        return train_dataset, None, left_out
    eval_dataset, more = build_dataset(eval_files, *settings)
    return train_dataset, eval_dataset, left_out + more


def build_dataset(
    files: Sequence[str],
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    skip_invalid: bool = False,
) -> tuple[Dataset, list[RecordError]]:
    """Read `files` into the tokenized dataset of a stage, and the records that were left out.

    Columns: `input_ids`, `labels` (SFT); `chosen_ids`, `rejected_ids` (reward); `input_ids` (PPO). A ranking of k
    completions gives k·(k−1)/2 reward rows. `max_length` counts tokens of a row; a longer row is invalid rather
    than cut, since a cut answer teaches a model not to end.

    Raises `BrokenRecordsError` if a record is invalid and `skip_invalid` is false, `UserError` if no row is left.
    """
    adapter = ADAPTERS[stage]
    rows: list[dict[str, list[int]]] = []
    invalid: list[RecordError] = []
    for file in files:
        for raw in tqdm(read_records(file), desc=f"Reading {file}", delay=2, leave=False):
            try:
                rows += _rows(adapter, raw, tokenizer, max_length)
            except RecordError as error:
                invalid.append(error)
    if invalid and not skip_invalid:
        raise BrokenRecordsError(invalid)
    for broken in invalid:
        logger.warning("left out: %s", broken)
    if not rows:
        raise UserError(f"no {stage} record in {', '.join(files)}")
    logger.info("%s: %d rows from %s, %d records left out", stage, len(rows), files, len(invalid))
    return Dataset.from_list(rows), invalid


def _rows(
    adapter: _Adapter,
    raw: RawRecord,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> list[dict[str, list[int]]]:
    rows = [adapter.row(tokenizer, record) for record in adapter.parse(raw)]
    if max_length is not None:
        longest = max(len(ids) for row in rows for ids in row.values())
        if longest > max_length:
            raise RecordError(raw.source, "(whole record)", f"{longest} tokens", f"at most {max_length} tokens")
    return rows
