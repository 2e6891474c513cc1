"""The right tokenizer class, special tokens and chat template.

`skt/kogpt2-base-v2` holds a `tokenizer.json` and no `tokenizer_config.json`. `AutoTokenizer` takes it for GPT-2's
byte-level tokenizer and turns Korean into bytes, without an error. `load_tokenizer` reads `tokenizer.json` as it is.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError

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
    themselves. A tokenizer that has a chat template keeps it. No token is added: a model without a pad token pads
    with its unknown token, or where there is none, with its end-of-sequence token.

    Raises `UserError` if there is no tokenizer, or if it has more entries than the model's embedding.
    """

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    try:
        tokenizer_json = find("tokenizer.json")
        if tokenizer_json and not find("tokenizer_config.json"):
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json)
            vocabulary = tokenizer.get_vocab()
            known: Any = {k: v for k, v in KOGPT2_SPECIAL_TOKENS.items() if v in vocabulary}
            tokenizer.add_special_tokens(known)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at '{path}': {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer at '{path}' names no end-of-sequence token; add a tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    if find("config.json"):
        check_fits(tokenizer, AutoConfig.from_pretrained(path, revision=revision).vocab_size, path)
    return tokenizer


def check_fits(tokenizer: PreTrainedTokenizerBase, embedding_size: int, model: str | Path) -> None:
    """Refuse a tokenizer whose ids reach past an embedding of `embedding_size` rows."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, and the embedding of {model} has {embedding_size} rows: "
            "they don't belong together, or tokens were added. Use the model's own tokenizer."
        )
