"""Text → token ids, through the tokenizer's chat template."""

from collections.abc import Sequence
from itertools import chain

from kochat_trl.data.records import Messages
from kochat_trl.errors import UserError
from kochat_trl.models.template import PROBE, answer_shape, answered, appended, render

from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross-entropy leaves out


def encode_after(tokenizer: PreTrainedTokenizerBase, befores: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as they stand right after its `before`, without fusing across the boundary.

    A `before` is empty at the start of a sequence. Where tokenizing the joined text would fuse, the ids are taken
    after a full stop instead, which keeps the text from being read as the start of a sequence.
    """
    found: list[list[int] | None] = [None] * len(texts)
    for anchors in (list(befores), ["."] * len(texts)):
        missing = [i for i, ids in enumerate(found) if ids is None]
        if missing:
            heads = tokenizer([anchors[i] for i in missing], add_special_tokens=False)["input_ids"]
            joined = tokenizer([anchors[i] + texts[i] for i in missing], add_special_tokens=False)["input_ids"]
            for i, head, ids in zip(missing, heads, joined, strict=True):
                if ids[: len(head)] == head:
                    found[i] = ids[len(head) :]
    for text, ids in zip(texts, found, strict=True):
        if ids is None:
            raise UserError(f"the tokenizer fuses {text[:40]!r} with any text before it; use another template")
    return [ids for ids in found if ids is not None]


def encode_turns(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages]) -> list[list[list[int]]]:
    """The ids of each dialogue in its parts: prompt, answer, prompt, answer, ...; it may end with either.

    An answer ends with its end; what the template writes after that begins the next prompt.
    """
    shape = answer_shape(tokenizer)
    befores: list[str] = []
    texts: list[str] = []
    counts = []
    for messages in dialogues:
        text, start = "", len(texts)
        for end in range(1 + (messages[0]["role"] == "system"), len(messages) + 1, 2):
            prompt_text = appended(text, render(tokenizer, messages[:end], prompt=True))
            befores.append(text)
            texts.append(prompt_text[len(text) :])
            if end < len(messages):
                text = answered(tokenizer, shape, prompt_text, messages[: end + 1])
                befores.append(prompt_text)
                texts.append(text[len(prompt_text) :])
        counts.append(len(texts) - start)
    parts = iter(encode_after(tokenizer, befores, texts))
    return [[next(parts) for _ in range(count)] for count in counts]


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages]
) -> list[tuple[list[int], list[int]]]:
    """`(input_ids, labels)` of each dialogue, both of length (sequence,).

    Labels are the ids on every assistant turn, its end included, and −100 elsewhere; the last id is the end of the last
    answer.
    """
    encoded = []
    for parts in encode_turns(tokenizer, dialogues):
        labels = [part if i % 2 else [IGNORED] * len(part) for i, part in enumerate(parts)]
        encoded.append((list(chain(*parts)), list(chain(*labels))))
    return encoded


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[int]]:
    """`encode_dialogues` of one dialogue."""
    return encode_dialogues(tokenizer, [messages])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """The ids that a policy is given to answer each prompt: messages that end with the user's.

    Where exchanges stand before it, they have the ids that they have in training.
    """
    return [list(chain(*parts)) for parts in encode_turns(tokenizer, prompts)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """`encode_prompts` of one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def shorten_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages, max_length: int) -> list[int]:
    """The ids of `prompt` in its template, less as many tokens at the start of its last text as are over `max_length`.

    Empty if nothing of that text is left then.
    """
    *before, last = prompt
    own_text = last["content"].strip()
    text = render(tokenizer, [*before, last | {"content": own_text}], prompt=True)
    start = render(tokenizer, [*before, last | {"content": PROBE[0]}], prompt=True).rfind(PROBE[0])
    if start < 0 or not text.startswith(own_text, start):
        raise UserError("the chat template changes prompts, so they can't be cut; use `overlong: drop`")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, end = encoded["input_ids"], start + len(own_text)
    own = [i for i, (low, high) in enumerate(encoded["offset_mapping"]) if start <= low < high <= end]
    excess = len(ids) - max_length
    return ids[: own[0]] + ids[own[excess] :] if len(own) > excess else []
