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

    def answer_of(messages: Messages) -> Any:
        if tokenizer is not None:
            prompt_text = prompt_of(messages[:-1])
            return answered(tokenizer, answer_shape(tokenizer), prompt_text, messages)[len(prompt_text) :]
        return [messages[-1]] if len(messages) > 2 else messages[-1]["content"]

    if isinstance(record, Prompt):
        yield {"prompt": prompt_of(record.messages)}
    elif isinstance(record, Ranking):
        dialogues = [record.messages(i) for i in range(len(record.completions))]
        prompt, answers = prompt_of(dialogues[0][:-1]), [answer_of(messages) for messages in dialogues]
        for better, worse, distance in record.pairs(options.pairs):
            row = {"prompt": prompt, "chosen": answers[better], "rejected": answers[worse]}
            if options.rank_margins:
                row["margin"] = float(distance)
            row["group"] = group
            yield row
    elif isinstance(record, Labelled):
        prompt, completion = prompt_of(record.messages[:-1]), answer_of(record.messages)
        yield {"prompt": prompt, "completion": completion, "label": record.label}
    elif len(record.texts) == 2:
        messages = record.messages
        yield {"prompt": prompt_of(messages[:-1]), "completion": answer_of(messages)}
    elif tokenizer is None:
        yield {"messages": list(record.messages)}
    else:
        yield {"text": answered(tokenizer, answer_shape(tokenizer), "", record.messages)}
