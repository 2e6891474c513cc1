"""Answers from a causal LM, by any decoding strategy, and what is said of them; and a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
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
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

_DECODING = yaml.safe_load(files(__package__).joinpath("decoding.yaml").read_text(encoding="utf-8"))
PLAIN: dict[str, Any] = _DECODING["plain"]
PRESETS: dict[str, dict[str, Any]] = _DECODING["presets"]


@dataclass(frozen=True)
class Response:
    """A response: its text, and its ids, the token that ends it among them where the model `ended` it itself."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def decoding(preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every generation setting of a preset, with `FIELD=VALUE`s over it (values are read as YAML).

    Raises `UserError` for a preset or a field of transformers' GenerationConfig that there is none of.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset '{preset}'; there are {', '.join(PRESETS)}")
    settings = PLAIN | PRESETS[preset]
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {*_DECODING["refused"]}
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set: found '{word}', expected FIELD=VALUE, such as temperature=0.7")
        if name not in known:
            raise UserError(f"--set: a generation config has no '{name}' here{nearest(name, known)}")
        settings[name] = yaml.safe_load(value)
        if isinstance(PLAIN.get(name), float) and isinstance(settings[name], int):
            settings[name] = float(settings[name])
    if not isinstance(settings["max_new_tokens"], int) or settings["max_new_tokens"] < 1:
        raise UserError(f"--set: max_new_tokens: found {settings['max_new_tokens']}, expected 1 or more")
    return settings


def _config(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    try:
        return GenerationConfig(**generation_ids(tokenizer) | settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"--set: {error}") from None


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
    config = _config(settings, tokenizer)
    ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    check_room(model, max(map(len, ids), default=0), settings["max_new_tokens"])
    answers: dict[int, Response] = {}
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in tqdm(range(0, len(ids), batch_size), desc="answering", delay=2, leave=False):
        places = by_length[start : start + batch_size]
        batch = tokenizer.pad([{"input_ids": ids[i]} for i in places], padding_side="left", return_tensors="pt")
        output = _generate(model, config, **batch.to(model.device))
        for i, row in zip(places, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = _answer(tokenizer, row)
    return [answers[i] for i in range(len(ids))]


def _generate(model: Any, config: GenerationConfig, **inputs: Any) -> torch.Tensor:
    """transformers' generate() without the model's own generation config, which fills in what `config` has as None."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # its LoRA layers are on all the same
    own, model.generation_config = model.generation_config, config
    try:
        return model.generate(**inputs, generation_config=config)
    except ValueError as error:
        raise UserError(f"--set: {error}") from None
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


class _AnswerStreamer(TextStreamer):
    """Prints an answer word by word, but what the template opens it with, and what it stops at."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._opening, self._stops = answer_shape(tokenizer).opening, stop_ids(tokenizer)
        self._held: str | None = ""  # what may be the opening; None once that is over

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self._stops:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._held is not None:
            self._held += text
            text = ""
            if stream_end or not self._opening.startswith(self._held.strip()):
                text, self._held = self._held.lstrip().removeprefix(self._opening).lstrip(), None
        super().on_finalized_text(text, stream_end)


class Chat:
    """A conversation with a model: it remembers, and answers word by word.

    `system` is a system message that stands before it. Raises `UserError` if the template takes none.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], system: str | None = None
    ):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.config = _config(settings, tokenizer)
        self.system = conversation(system=system)
        self.messages: list[dict[str, str]] = []  # the exchanges after it
        render(tokenizer, conversation("?", system=system), prompt=True)  # told before anything is said

    @torch.no_grad()
    def say(self, text: str) -> tuple[str, int]:
        """The answer to `text`, printed while it comes, and how many exchanges were forgotten to make room for it.

        Beams have no first word until they have the last, and are printed then. Raises `UserError`, and remembers
        nothing of it, if `text` alone doesn't fit the model.
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
        batch = self.tokenizer.pad([{"input_ids": ids}], return_tensors="pt").to(self.model.device)
        streams = self.settings["num_beams"] == 1
        streamer = _AnswerStreamer(self.tokenizer) if streams else None
        output = _generate(self.model, self.config, **batch, streamer=streamer)
        answer = _answer(self.tokenizer, output[0, len(ids) :].tolist())
        if not streams:
            print(answer.text)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer.text, forgotten

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()
