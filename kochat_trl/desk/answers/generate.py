"""Answers from a causal LM, by any decoding strategy, and what is said of them; and a chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from threading import Event
from typing import Any

from kochat_trl.data.records import Prompt, conversation
from kochat_trl.desk.answers.likeness import distinct
from kochat_trl.errors import UserError, nearest
from kochat_trl.models.loading import positions_of
from kochat_trl.models.template import answer_shape, answer_text, generation_ids, render, stop_ids
from kochat_trl.reward.score import score_ids
from kochat_trl.rows.encode import encode_prompt, encode_prompts

import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_DECODING = yaml.safe_load(files(__package__).joinpath("decoding.yaml").read_text(encoding="utf-8"))
FIELDS: dict[str, tuple[Any, Any, Any]] = _DECODING["fields"]
PLAIN: dict[str, Any] = {name: plain for name, (plain, _, _) in FIELDS.items()}
PRESETS: dict[str, dict[str, Any]] = _DECODING["presets"]


@dataclass(frozen=True)
class Response:
    """A response: its text, and its ids, the token that ends it among them where the model `ended` it itself."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def decoding(preset: str, /, **overrides: Any) -> dict[str, Any]:
    """Every generation setting of a preset, with `overrides` over it: fields of transformers' GenerationConfig.

    Raises `UserError` for a preset or a field that decoding.yaml has none of, and for a value out of a field's bounds.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset '{preset}'; there are {', '.join(PRESETS)}")
    return PLAIN | PRESETS[preset] | {name: _checked(name, value) for name, value in overrides.items()}


def _checked(name: str, value: Any) -> Any:
    if name not in FIELDS:
        raise UserError(f"decoding has no '{name}'" + nearest(name, {*FIELDS}, f"; it has {', '.join(FIELDS)}"))
    plain, least, most = FIELDS[name]
    kind = type(plain)
    typed = type(value) is kind or (kind is float and type(value) is int)
    if not typed or not least <= value <= most:
        number = "a whole number" if kind is int else "a number"
        expected = "true or false" if kind is bool else f"{number} from {least} to {most}"
        raise UserError(f"{name}: found {value!r}, expected {expected}")
    return kind(value)


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    batch_size: int = 64,
    seed: int = 0,
) -> list[Response]:
    """Answer each prompt, templated, with `settings` of `decoding`; prompts of like length go together.

    The result is the same for the same seed, batch size and prompts. Raises `UserError` if a prompt and its answer may
    take more positions than the model has.
    """
    torch.manual_seed(seed)
    model.eval()
    ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    check_room(model, max(map(len, ids), default=0), settings["max_new_tokens"])
    answers: dict[int, Response] = {}
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in tqdm(range(0, len(ids), batch_size), desc="answering", delay=2, leave=False):
        places = by_length[start : start + batch_size]
        batch = tokenizer.pad([{"input_ids": ids[i]} for i in places], padding_side="left", return_tensors="pt")
        output = _generate(model, tokenizer, settings, **batch.to(model.device))
        for i, row in zip(places, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = _answer(tokenizer, row)
    return [answers[i] for i in range(len(ids))]


@torch.no_grad()
def answer_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    settings: dict[str, Any],
    show: Callable[[str], None] | None = None,
    stop: Event | None = None,
) -> Response:
    """The answer to one prompt's ids, by `settings` of `decoding`, `show`n in pieces that make up its text.

    Beams have no first word until they have the last, and are shown then. Once `stop` is set at most one more token
    comes. Raises `UserError` if the prompt and its answer may take more positions than the model has.
    """
    check_room(model, len(prompt_ids), settings["max_new_tokens"])
    model.eval()
    batch: Any = tokenizer.pad([{"input_ids": prompt_ids}], return_tensors="pt").to(model.device)
    if show and settings["num_beams"] == 1:
        batch["streamer"] = _AnswerStreamer(tokenizer, show)
    if stop:
        batch["stopping_criteria"] = [lambda ids, scores: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    output = _generate(model, tokenizer, settings, **batch)
    answer = _answer(tokenizer, output[0, len(prompt_ids) :].tolist())
    if show and settings["num_beams"] > 1:
        show(answer.text)
    return answer


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], **inputs: Any) -> torch.Tensor:
    """transformers' generate() without the model's own generation config, which fills in what another has as None."""
    config = GenerationConfig(**generation_ids(tokenizer) | settings)
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # its LoRA layers are on all the same
    own, model.generation_config = model.generation_config, config
    try:
        return model.generate(**inputs, generation_config=config)
    except ValueError as error:  # there are models without beams
        raise UserError(f"decoding: {error}") from None
    finally:
        model.generation_config = own


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Response:
    """The answer in the ids of a row: what is up to the first token that an answer stops at."""
    stops = stop_ids(tokenizer)
    end = next((i for i, token_id in enumerate(ids) if token_id in stops), None)
    ids = ids if end is None else ids[: end + 1]
    return Response(answer_text(tokenizer, ids), tuple(ids), end is not None)


def check_room(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `UserError` if a prompt of so many tokens leaves no room for an answer in the model's positions."""
    positions = positions_of(model.config)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and an answer of up to {new_tokens} don't fit the model's {positions} "
            "positions; shorten the prompt, or lower max_new_tokens"
        )


@torch.no_grad()
def mean_logprob(model: Any, prompt_ids: Sequence[int], answer: Response, temperature: float = 1.0) -> float:
    """The mean of log p(token) over the tokens of an answer, in nats; of the model itself at temperature 1."""
    ids = torch.tensor([[*prompt_ids, *answer.ids]], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float() / temperature
    logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])
    return logprobs.mean().item()


def compare_decoding(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    strategies: dict[str, dict[str, Any]],
    seed: int = 0,
    scorer: Any = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """A row for each prompt and strategy: the answer, its length, distinct-2, mean log-probability, and score.

    A prompt's rows have its `system` message, if it has one. `scorer` is a reward model over the same vocabulary; it
    reads what was generated, also where no end was.
    """
    rows = []
    prompt_ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    for name, settings in strategies.items():
        answers = generate_answers(model, tokenizer, prompts, settings, batch_size, seed)
        full = [[*ids, *answer.ids] for ids, answer in zip(prompt_ids, answers, strict=True)]
        scores = score_ids(scorer, tokenizer, full, batch_size) if scorer is not None else [None] * len(full)
        for prompt, ids, answer, score in zip(prompts, prompt_ids, answers, scores, strict=True):
            row = prompt.fields | {"decoding": name, "completion": answer.text, "ended": answer.ended}
            row |= {"tokens": len(answer.ids), "distinct_2": distinct([answer.ids], 2)}
            row |= {"logprob": mean_logprob(model, ids, answer)} | ({} if score is None else {"score": score})
            rows.append((prompts.index(prompt), row))
    return [row for _, row in sorted(rows, key=itemgetter(0))]


def print_decodings(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for each prompt, a line for each strategy."""
    scored = any("score" in row for row in rows)
    for (prompt, _), its_rows in groupby(rows, lambda row: (row["prompt"], row.get("system"))):
        table = Table(title=Text(prompt), title_justify="left", show_lines=True)
        table.add_column("decoding")
        table.add_column("answer", overflow="fold", ratio=1)
        for heading in ("tokens", "distinct-2", "log p a token", *(["score"] if scored else [])):
            table.add_column(heading, justify="right")
        for row in its_rows:
            end = "" if row["ended"] else " …"  # cut at max_new_tokens
            figures = [f"{row[name]:.2f}" for name in ("distinct_2", "logprob", "score") if name in row]
            table.add_row(row["decoding"], Text(row["completion"] + end), f"{row['tokens']}", *figures)
        console.print(table)


class _AnswerStreamer(BaseStreamer):
    """Shows an answer as it grows, in pieces that make up its text: without what the template opens and closes it
    with, and a character once all its bytes are there."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        self._tokenizer, self._show, self._opening = tokenizer, show, answer_shape(tokenizer).opening
        self._ids: list[int] | None = None  # until the prompt has come
        self._shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        text = answer_text(self._tokenizer, self._ids).rstrip("\ufffd").rstrip()
        if not self._opening.startswith(text):  # which may be all that there is so far
            self._grow(text)

    def end(self) -> None:
        self._grow(answer_text(self._tokenizer, self._ids or []))

    def _grow(self, text: str) -> None:
        piece, self._shown = text[len(self._shown) :], text
        if piece:
            self._show(piece)


class Chat:
    """A conversation with a model: it remembers, and answers word by word.

    `system` is a system message that stands before it. Raises `UserError` if the template takes none.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], system: str | None = None
    ):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.system = conversation(system=system)
        self.messages: list[dict[str, str]] = []  # the exchanges after it
        render(tokenizer, conversation("?", system=system), prompt=True)  # told before anything is said

    def say(self, text: str) -> tuple[str, int]:
        """The answer to `text`, printed while it comes, and how many exchanges were forgotten to make room for it.

        Raises `UserError`, and remembers nothing of it, if `text` alone doesn't fit the model.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        while True:
            ids = encode_prompt(self.tokenizer, [*self.system, *messages])
            try:
                check_room(self.model, len(ids), self.settings["max_new_tokens"])
                break
            except UserError:
                if len(messages) == 1:
                    raise
                del messages[:2]
        forgotten = (len(self.messages) + 1 - len(messages)) // 2
        show = partial(print, end="", flush=True)
        answer = answer_ids(self.model, self.tokenizer, ids, self.settings, show)
        print()
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer.text, forgotten

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()
