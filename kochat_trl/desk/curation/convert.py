"""Records → rows of text in TRL's dataset formats: the engine of `kochat data convert`."""

from collections.abc import Iterator
from typing import Any

from kochat_trl.data.records import Labelled, Messages, Prompt, Ranking, Record
from kochat_trl.models.template import answer_shape, answered, render
from kochat_trl.models.tokenizer import CHAT_TEMPLATE
from kochat_trl.settings.keys import DataArguments

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def template_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer for KoChatGPT's template alone, with kogpt2's `</s>`: it renders text and has no vocabulary."""
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def text_rows(
    record: Record, group: int, options: DataArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of text that `record` gives, in TRL's dataset formats.

    With a tokenizer its template is applied: `prompt` and `completion` (SFT), `prompt`, `chosen` and `rejected`
    (preference) or `prompt`, each to be tokenized as it stands, and ending where rows do; a dialogue of several
    exchanges is one `text`. Without, the same names hold the plain texts, or of a record with more before its answer
    than one question, which no plain text can tell, lists of messages; a dialogue of several exchanges is `messages`.
    Pairs of one ranking share its `group`, and have a `margin` if the options ask for it; an answer of KTO's has its
    `label`.
    """

    def prompt_of(messages: Messages) -> Any:
        if tokenizer is not None:
            return render(tokenizer, messages, prompt=True)
        return list(messages) if len(messages) > 1 else messages[-1]["content"]

    def answer_of(asked: Messages, text: str) -> Any:
        if tokenizer is None and len(asked) == 1:
            return text
        message = {"role": "assistant", "content": text}
        if tokenizer is None:
            return [message]
        prompt_text = prompt_of(asked)
        return answered(tokenizer, answer_shape(tokenizer), prompt_text, [*asked, message])[len(prompt_text) :]

    if isinstance(record, Prompt):
        yield {"prompt": prompt_of(record.messages)}
    elif isinstance(record, Ranking):
        asked = record.asked.messages
        prompt, answers = prompt_of(asked), [answer_of(asked, text) for text in record.completions]
        for better, worse, distance in record.pairs(options.pairs):
            row = {"prompt": prompt, "chosen": answers[better], "rejected": answers[worse]}
            if options.rank_margins:
                row["margin"] = float(distance)
            row["group"] = group
            yield row
    elif isinstance(record, Labelled):
        asked = record.asked.messages
        yield {"prompt": prompt_of(asked), "completion": answer_of(asked, record.completion), "label": record.label}
    elif len(record.texts) == 2:
        *asked, answer = record.messages
        yield {"prompt": prompt_of(asked), "completion": answer_of(asked, answer["content"])}
    elif tokenizer is None:
        yield {"messages": list(record.messages)}
    else:
        yield {"text": answered(tokenizer, answer_shape(tokenizer), "", record.messages)}
