"""How KoChatGPT's data is made: prompts from a seed file, answers of several models ranked, held-out records."""

import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.parse import parse
from kochat_trl.data.readers import file_format, read_records
from kochat_trl.data.reading import check_columns, read_as, read_parsed
from kochat_trl.data.records import Prompt, RecordError, conversation
from kochat_trl.data.text import normalized
from kochat_trl.desk.curation.finders import prompt_key
from kochat_trl.desk.writers import write_stream
from kochat_trl.errors import UserError
from kochat_trl.files import new_file

RankedAs = Literal["ranking", "sft", "preference"]


def read_prompts(
    file: str, skip_invalid: bool = False, limit: int | None = None, options: ReadingOptions = DEFAULTS
) -> tuple[list[Prompt], list[RecordError]]:
    """The prompts of the first `limit` records of any data file, in its order, and the records that have none.

    Raises `BrokenRecordsError` if there are such records, unless `skip_invalid`.
    """
    invalid: list[RecordError] = []
    found = read_as("prompt", [file], invalid, options=options, skip_invalid=skip_invalid, limit=limit)
    return [record for _, record in found], invalid


def gather_answers(
    source: str, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """The answers of `source`, a file of answers or a model or adapter (folder or Hub name), to `prompts`."""
    if Path(source).is_file():
        return answers_in(source, prompts)
    from kochat_trl.desk.answers.generate import decoding, generate_answers
    from kochat_trl.models.loading import load_policy
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.settings.keys import ModelArguments

    tokenizer = load_tokenizer(source)
    model = load_policy(source, ModelArguments(dtype="float32"), tokenizer)
    fields = {"max_new_tokens": max_new_tokens} | ({"temperature": temperature} if temperature else {})
    settings = decoding("sample" if temperature else "greedy", **fields)
    answers = generate_answers(model, tokenizer, prompts, settings, seed=seed)
    return [answer.text for answer in answers]


def gather_scores(reward_model: str, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """The scores that the reward model (adapter with its head, or merged) gives; `answers` as in `rank_answers`."""
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.reward.score import load_scorer, score_dialogues

    tokenizer = load_tokenizer(reward_model)
    model = load_scorer(reward_model, "float32", tokenizer)
    dialogues = [
        [(*prompt.messages, *conversation("", answer)[1:]) for prompt, answer in zip(prompts, its, strict=True)]
        for its in answers
    ]
    return [score_dialogues(model, tokenizer, its) for its in dialogues]


def answers_in(file: str, prompts: Sequence[Prompt]) -> list[str]:
    """The answer that `file` has for each of `prompts`: the first one, where it has several, and it may be empty.

    An answer under the prompt's own system message goes before one that names none; no other is taken. Raises
    `UserError` if the file lacks some, or if a record is broken.
    """

    def read(raw: RawRecord) -> list[tuple[str, str | None, str]]:
        try:
            dialogues: list[Any] = parse(raw, "sft")
        except RecordError as error:
            if error.fault != "empty":
                raise
            return [(prompt_key(prompt), prompt.system, "") for prompt in prompts_of(raw)]
        return [
            (normalized("\n".join(dialogue.texts[:i])), dialogue.system, dialogue.texts[i])
            for dialogue in dialogues
            for i in range(1, len(dialogue.texts), 2)
        ]

    answers: dict[tuple[str, str | None], str] = {}
    for _, (key, system, answer) in read_parsed(read, [file], []):
        answers.setdefault((key, system), answer)
    keys = [[(prompt_key(prompt), system) for system in (prompt.system, None)] for prompt in prompts]
    missing = [prompt.prompt for prompt, its in zip(prompts, keys, strict=True) if answers.keys().isdisjoint(its)]
    if missing:
        raise UserError(f"{file}: no answer to {len(missing)} of {len(prompts)} prompts, such as {missing[:3]}")
    return [answers[own if own in answers else bare] for own, bare in keys]


def rank_answers(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    seed: int,
    scores: Sequence[Sequence[float]] | None = None,
    to: RankedAs = "ranking",
) -> tuple[list[dict[str, Any]], list[str]]:
    """KoChatGPT's ranking records, and the prompts that have no two answers of which one is better.

    `answers[s][i]` is the answer of source `s` to prompt `i`, the sources best first; or ranked by `scores`, laid out
    likewise, where equal scores are a tie. Empty answers are left out, and of equal ones all but the best. The
    completions of a record are in an order of their own, drawn from `seed` and the place of the prompt.

    `to="preference"` takes the best and a worst of these answers (`chosen`, `rejected`) instead, and `to="sft"` the
    best (`completion`), also where it is the only one; of tied answers it is that of the first source.
    """
    records, left_out = [], []
    for i, prompt in enumerate(prompts):
        worth = [scores[s][i] if scores else -s for s in range(len(answers))]
        best: dict[str, float] = {}  # answer → what the best of its sources is worth
        for source in sorted(range(len(answers)), key=worth.__getitem__, reverse=True):
            if answers[source][i].strip():
                best.setdefault(answers[source][i], worth[source])
        tiers = [list(tied) for _, tied in groupby(best, best.__getitem__)]
        if len(tiers) < (1 if to == "sft" else 2):
            left_out.append(prompt.prompt)
        elif to == "sft":
            records.append(prompt.fields | {"completion": tiers[0][0]})
        elif to == "preference":
            records.append(prompt.fields | {"chosen": tiers[0][0], "rejected": tiers[-1][0]})
        else:
            completions = list(best)
            random.Random(f"{seed}/{i}").shuffle(completions)
            places = [sorted(map(completions.index, tier)) for tier in tiers]
            record = prompt.fields | {f"completion_{place}": answer for place, answer in enumerate(completions)}
            records.append(record | {"ranking": [tier[0] if len(tier) == 1 else tier for tier in places]})
    return records, left_out


def split_file(
    file: str, train: str, held_out: str, fraction: float, seed: int, options: ReadingOptions = DEFAULTS
) -> tuple[int, int]:
    """Write the records of `file`, in their order and shape, to `train` and `held_out`; return how many each has.

    Records with the same prompt (after NFKC and whitespace) go together. Prompts are drawn, by `seed`, until they
    hold `fraction` of the records.

    Raises `UserError` if `fraction` leaves one of the two empty, if an output exists, or if a record is unreadable.
    """
    if Path(train).resolve() == Path(held_out).resolve():
        raise UserError(f"{train} is named twice; the two outputs need a name each")
    records = list(read_records(file, options))
    groups: dict[str, list[int]] = {}
    for i, raw in enumerate(records):
        asked = prompts_of(raw)  # those of a broken record go together, for `kochat data clean` to mend
        groups.setdefault(prompt_key(asked[0]) if asked else "", []).append(i)
    check_columns([raw.layout for raw in records[:1]])
    wanted = fraction * len(records)
    drawn: set[int] = set()
    order = sorted(groups)
    random.Random(f"{seed}/split").shuffle(order)
    for key in order:
        if len(drawn) + len(groups[key]) / 2 <= wanted:
            drawn.update(groups[key])
    if not drawn or len(drawn) == len(records):
        raise UserError(f"{file}: {len(groups)} different prompts can't be split at {fraction}")
    shape = file_format(file, options)
    with new_file(train) as first, new_file(held_out) as second:  # neither appears without the other
        write_stream(first, shape, (raw.fields for i, raw in enumerate(records) if i not in drawn))
        write_stream(second, shape, (raw.fields for i, raw in enumerate(records) if i in drawn))
    return len(records) - len(drawn), len(drawn)


def prompts_of(raw: RawRecord) -> list[Any]:
    """The prompts of a record; none if it is broken. Raises `RecordError` if it is no record at all."""
    raw.known_fields()
    try:
        return parse(raw, "prompt")
    except RecordError as error:
        if error.fault == "unclear":
            raise
        return []
