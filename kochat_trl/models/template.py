"""The chat template: which one can be trained with, and where in it an answer ends.

A base's own template may rewrite earlier turns, or promise a thought in the prompt and leave it out of the answer: the
ids of a prompt are then no prefix of prompt + answer, and training would learn what is never sampled. TRL has a twin
for many of those, and some have a switch. Which token an answer ends with is found by looking at what stands after one.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from kochat_trl.data.records import Messages, conversation
from kochat_trl.errors import UserError

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

NO_THINKING = "{%- set enable_thinking = enable_thinking | default(false) -%}"  # a switch that Qwen3 and others have
PROBE = ("질문하나", "대답하나", "질문둘", "대답둘")  # words that no template has
_BROKEN = (TemplateError, TypeError, ValueError, KeyError)  # what a template, or what it is given, may end in
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerShape:
    """What a template writes around an answer's own text, after the prompt."""

    opening: str  # as it is decoded: an empty thought, say; mostly nothing
    end: str  # the token that the assistant's turn closes with, <|im_end|> or </s>
    end_id: int


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool = False) -> str:
    """The template's text of `messages`; with `prompt`, up to where the assistant's answer starts.

    Raises `UserError` if the template refuses them, as Gemma's does a system message.
    """
    roles = ", ".join(message["role"] for message in messages)
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except _BROKEN as error:
        raise UserError(f"the chat template takes no messages of {roles}: {error}") from None
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise UserError(f"the chat template takes no messages of {roles}: it leaves the system message out")
    return text


def appended(before: str, text: str) -> str:
    """`text`, which must begin with `before`."""
    if text.startswith(before):
        return text
    raise UserError(
        "the chat template rewrites earlier turns when a turn is added, so a dialogue has no fixed ids; use a template "
        "that only appends"
    )


def answered(tokenizer: PreTrainedTokenizerBase, shape: AnswerShape, prompt_text: str, messages: Messages) -> str:
    """The template's text of `messages`, which end with an answer, up to the token that ends it.

    What the template writes after that token is no part of the answer: it stands before the next turn.
    """
    text = appended(prompt_text, render(tokenizer, messages))
    end = text.rfind(shape.end, len(prompt_text))
    if end < 0:
        raise UserError(f"the chat template doesn't close this answer with {shape.end}: {text[-60:]!r}")
    return text[: end + len(shape.end)]


def answer_shape(tokenizer: PreTrainedTokenizerBase) -> AnswerShape:
    """Where an answer starts and ends in the tokenizer's template.

    The end is the last special, or else added, token of what stands after an answer whether or not more turns follow:
    the newline after ChatML's `<|im_end|>` is no part of it, nor the end of text that Phi-3 writes after a dialogue.

    Raises `UserError` if there is no such token, so that SFT would teach no end, or if the prompt is no prefix of
    prompt + answer.
    """
    return _answer_shape(tokenizer, str(tokenizer.chat_template), len(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _answer_shape(tokenizer: PreTrainedTokenizerBase, *what_it_depends_on: Any) -> AnswerShape:
    prompt_text, text = (render(tokenizer, conversation(*PROBE[:n]), prompt=n == 1) for n in (1, 2))
    if not text.startswith(prompt_text) or PROBE[1] not in text[len(prompt_text) :]:
        start = len(_common(prompt_text, text))
        raise UserError(
            f"the chat template lets an answer begin after {prompt_text[start:]!r}, and writes one that is there as "
            f"{text[start:]!r}: what is trained would never be sampled. Put another template into chat_template.jinja"
        )
    opening, _, closing = text[len(prompt_text) :].partition(PROBE[1])
    between = render(tokenizer, conversation(*PROBE[:3]), prompt=True).partition(PROBE[1])[2]
    opened, closed, more = tokenizer([opening, closing, between], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    other = {i for i, token in added.items() if token.content.strip()}  # Gemma's newlines are added tokens too
    both = _common(closed, more)
    found = ([i for i in part if i in tokens] for tokens in (special, other) for part in (both, closed))
    ends = next(filter(None, found), None)
    if ends is None:
        raise UserError(
            f"the chat template closes an answer with {closing!r}, in which the tokenizer has no special token: SFT "
            "would teach no end. Use a template that closes with a token of the tokenizer, such as its eos_token"
        )
    opening = str(tokenizer.decode(opened, skip_special_tokens=True)).strip()
    return AnswerShape(opening, str(tokenizer.convert_ids_to_tokens(ends[-1])), ends[-1])


def _common(one: Iterable[Any], other: Iterable[Any]) -> list[Any]:
    """What two texts, or lists, begin with alike."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def settle_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer` have a template that can be trained with: its own, TRL's twin of it, or one that doesn't think.

    It is the first of them that leaves earlier turns as they are, or else that takes a single exchange. Raises
    `UserError`, with what is wrong with the tokenizer's own, if none does.
    """
    own: Any = tokenizer.chat_template
    wrong: list[UserError] = []
    taken: tuple[Any, str] | None = None
    for template, told in _templates(tokenizer):
        tokenizer.chat_template = template
        try:
            shape = answer_shape(tokenizer)
            taken = taken or (template, told)
            first = answered(tokenizer, shape, "", conversation(*PROBE[:2]))
            second = appended(first, render(tokenizer, conversation(*PROBE[:3]), prompt=True))
            answered(tokenizer, shape, second, conversation(*PROBE))
        except UserError as error:
            wrong.append(error)
            continue
        taken = (template, told)
        break
    if taken is None:
        tokenizer.chat_template = own
        raise wrong[0]
    tokenizer.chat_template, told = taken
    if told:
        logger.info("The chat template is %s, and is saved with the model: %s", told, wrong[0])


def _templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Any, str]]:
    """Templates to try, and what is to be told of each."""
    own: Any = tokenizer.chat_template  # may be several by name
    stock = tokenizer.get_chat_template()
    yield own, ""
    tokenizer.chat_template = stock
    try:
        twin = get_training_chat_template(tokenizer)
    except _BROKEN:  # it knows none
        twin = None
    if twin:
        yield twin, "TRL's for training in place of the tokenizer's own"
    if "enable_thinking" in stock:
        yield NO_THINKING + stock, "the tokenizer's own with thinking off"


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that an answer stops at: its end in the template, and the end of text."""
    ids = [tokenizer.eos_token_id]
    return ids if tokenizer.chat_template is None else list(dict.fromkeys([answer_shape(tokenizer).end_id, *ids]))


def generation_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The special tokens of a GenerationConfig."""
    stops = stop_ids(tokenizer)
    ends = stops[0] if len(stops) == 1 else stops
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer's ids, without special tokens and what the template opens an answer with."""
    stops = stop_ids(tokenizer)
    own = [i for i in ids if i not in stops]  # an end that is added and not special would be text
    text = str(tokenizer.decode(own, skip_special_tokens=True)).strip()
    opening = "" if tokenizer.chat_template is None else answer_shape(tokenizer).opening
    return text.removeprefix(opening).strip() if opening else text
