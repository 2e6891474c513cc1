"""The right tokenizer class, special tokens and chat template.

`skt/kogpt2-base-v2` holds a `tokenizer.json` and no `tokenizer_config.json`. `AutoTokenizer` takes it for GPT-2's
byte-level tokenizer and turns Korean into bytes, without an error. `load_tokenizer` reads `tokenizer.json` as it is.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.remote import remote_code_allowed, why_not
from kochat_trl.models.template import settle_template

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

# Roles that tokens of kogpt2 play; its `tokenizer.json` has the tokens but doesn't say what they are for.
KOGPT2_SPECIAL_TOKENS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}

# KoChatGPT's short prompt, turn after turn; the generation block marks what the assistant says, its `</s>` included.
# A system message, if there is one, stands before it, as KoChatGPT's optional preamble does.
CHAT_TEMPLATE = files(__package__).joinpath("kochatgpt.jinja").read_text(encoding="utf-8")


def load_tokenizer(path: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model, adapter or Hub name `path`, ready for all stages and for generation.

    Padding is on the left, where batched generation needs it; TRL's SFT and reward collators pad on the right by
    themselves. A tokenizer keeps its chat template if that can be trained with (`template.py`). No token is added: a
    model without a pad token pads with its unknown token, or where there is none, with its end-of-sequence token.

    Raises `UserError` if there is no tokenizer, if it has more entries than the model's embedding, or if its template
    teaches no end of an answer.
    """

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    trusted: Any = {"revision": revision, "trust_remote_code": remote_code_allowed()}
    try:
        tokenizer_json = find("tokenizer.json")
        if tokenizer_json and not find("tokenizer_config.json"):
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json)
            vocabulary = tokenizer.get_vocab()
            known: Any = {k: v for k, v in KOGPT2_SPECIAL_TOKENS.items() if v in vocabulary}
            tokenizer.add_special_tokens(known)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **trusted)
        config = AutoConfig.from_pretrained(path, **trusted) if find("config.json") else None
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at '{path}': {why_not(error)}") from None
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer at '{path}' names no end-of-sequence token; add a tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    try:
        settle_template(tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer.padding_side = "left"
    if config is not None:
        check_fits(tokenizer, config.get_text_config().vocab_size, path)
    return tokenizer


def check_fits(tokenizer: PreTrainedTokenizerBase, embedding_size: int, model: str | Path) -> None:
    """Refuse a tokenizer whose ids reach past an embedding of `embedding_size` rows."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, and the embedding of {model} has {embedding_size} rows: "
            "they don't belong together, or tokens were added. Use the model's own tokenizer."
        )


def check_same_tokens(one: PreTrainedTokenizerBase, path: str, other: PreTrainedTokenizerBase, other_path: str) -> None:
    """Refuse tokenizers of two folders that make other tokens of a text."""
    if one.get_vocab() != other.get_vocab():
        raise UserError(f"{other_path} reads other tokens than {path}: train both from the same base")


def check_same_texts(one: PreTrainedTokenizerBase, path: str, other: PreTrainedTokenizerBase, other_path: str) -> None:
    """Refuse tokenizers of two folders that make other tokens of a text, or other texts of an exchange."""
    check_same_tokens(one, path, other, other_path)
    if one.get_chat_template() != other.get_chat_template():
        raise UserError(f"{other_path} has another chat template than {path}: what one writes the other never read")
