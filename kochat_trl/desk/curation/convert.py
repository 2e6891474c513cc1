"""Records → rows of text in TRL's dataset formats: the engine of `kochat data convert`."""

from collections.abc import Iterator
from typing import Any

from kochat_trl.data.records import Prompt, Ranking, Record
from kochat_trl.models.tokenizer import CHAT_TEMPLATE
from kochat_trl.rows.encode import appended, conversation, render
from kochat_trl.settings.keys import DataArguments

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def template_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer for KoChatGPT's template alone, with kogpt2's `</s>`: it renders text and has no vocabulary."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()), eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def text_rows(
    record: Record, group: int, options: DataArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of text that `record` gives, in TRL's dataset formats.

    With a tokenizer its template is applied: `prompt` and `completion` (SFT), `prompt`, `chosen` and `rejected`
    (preference) or `prompt`, each to be tokenized as it stands; a dialogue of several exchanges is one `text`.
    Without, the same names hold the plain texts, and a dialogue of several exchanges is `messages`. Pairs of one
    ranking share its `group`, and have a `margin` if the options ask for it.
    """

    def applied(prompt: str, answer: str = "") -> tuple[str, str]:
        if tokenizer is None:
            return prompt, answer
        messages = conversation(prompt, answer)
        prompt_text = render(tokenizer, messages[:1], prompt=True)
        return prompt_text, appended(prompt_text, render(tokenizer, messages))[len(prompt_text) :]

    if isinstance(record, Prompt):
        yield {"prompt": applied(record.prompt)[0]}
    elif isinstance(record, Ranking):
        answers = [applied(record.prompt, completion)[1] for completion in record.completions]
        for better, worse, distance in record.pairs(options.pairs):
            margin = {"margin": float(distance)} if options.rank_margins else {}
            row = {"prompt": applied(record.prompt)[0], "chosen": answers[better], "rejected": answers[worse]}
            yield row | margin | {"group": group}
    elif len(record.messages) == 2:
        prompt, completion = applied(*(message["content"] for message in record.messages))
        yield {"prompt": prompt, "completion": completion}
    elif tokenizer is None:
        yield {"messages": list(record.messages)}
    else:
        yield {"text": render(tokenizer, record.messages)}
