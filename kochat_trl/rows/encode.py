"""Text → token ids, through the tokenizer's chat template."""

from collections.abc import Sequence

from kochat_trl.errors import UserError

from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


IGNORED = -100  # the label that cross-entropy leaves out


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool = False) -> str:
    """The template's text of `messages`; with `prompt`, up to where the assistant's answer starts."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


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


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages]
) -> list[tuple[list[int], list[int]]]:
    """`(input_ids, labels)` of each dialogue, both of length (sequence,).

    Labels are the ids on every assistant turn, its end-of-turn token included, and −100 elsewhere.
    """
    befores: list[str] = []
    texts: list[str] = []  # of each dialogue in turn: prompt, answer, prompt, answer, ...
    for messages in dialogues:
        text = ""
        for end in range(2, len(messages) + 1, 2):
            prompt_text = appended(text, render(tokenizer, messages[: end - 1], prompt=True))
            full_text = appended(prompt_text, render(tokenizer, messages[:end]))
            befores += [text, prompt_text]
            texts += [prompt_text[len(text) :], full_text[len(prompt_text) :]]
            text = full_text
    parts = iter(encode_after(tokenizer, befores, texts))
    encoded = []
    for messages in dialogues:
        input_ids: list[int] = []
        labels: list[int] = []
        for _ in range(0, len(messages) - 1, 2):
            prompt_ids, answer_ids = next(parts), next(parts)
            input_ids += prompt_ids + answer_ids
            labels += [IGNORED] * len(prompt_ids) + answer_ids
        encoded.append((input_ids, labels))
    return encoded


def appended(before: str, text: str) -> str:
    """`text`, which must begin with `before`."""
    if text.startswith(before):
        return text
    raise UserError(
        "the chat template rewrites earlier turns when a turn is added, so a dialogue has no fixed ids; use a template "
        "that only appends"
    )


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[int]]:
    """`encode_dialogues` of one dialogue."""
    return encode_dialogues(tokenizer, [messages])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The ids that a policy is given to answer each prompt."""
    texts = [render(tokenizer, [{"role": "user", "content": prompt}], prompt=True) for prompt in prompts]
    return encode_after(tokenizer, [""] * len(texts), texts)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """`encode_prompts` of one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def shorten_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> list[int]:
    """The ids of `prompt` in its template without as many tokens at its start as are over `max_length`.

    Empty if nothing of the prompt is left then.
    """
    prompt = prompt.strip()
    text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
    start = text.find(prompt)
    if start < 0:
        raise UserError("the chat template changes prompts, so they can't be cut; use `overlong: drop`")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    own = [i for i, (low, high) in enumerate(encoded["offset_mapping"]) if start <= low < high <= start + len(prompt)]
    excess = len(ids) - max_length
    return ids[: own[0]] + ids[own[excess] :] if len(own) > excess else []


def conversation(prompt: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    """One exchange, as the messages of a chat template."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
