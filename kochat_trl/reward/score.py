"""Texts → the scores of a trained reward model."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from kochat_trl.data.records import Messages
from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_reward_model, positions_of
from kochat_trl.rows.encode import encode_dialogues
from kochat_trl.settings.keys import ModelArguments

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

Loading = Literal["float32", "int8", "nf4"]


LOADING: dict[Loading, dict[str, Any]] = {
    "float32": {},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def score_dialogues(
    model: Any, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages], batch_size: int = 64
) -> list[float]:
    """The reward model's score of each dialogue, read at its last token, which ends the answer.

    Raises as `score_ids` does.
    """
    return score_ids(model, tokenizer, [ids for ids, _ in encode_dialogues(tokenizer, dialogues)], batch_size)


@torch.no_grad()
def score_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], batch_size: int = 64
) -> list[float]:
    """The score of each sequence of ids, in their order; they are batched by length and padded on the right.

    Raises `UserError` if one is longer than the model has positions, or if a score is not a finite number.
    """
    model.eval()
    positions = positions_of(model.config)
    if positions is not None and (overlong := sum(len(row) > positions for row in ids)):
        raise UserError(
            f"{overlong} of {len(ids)} texts are longer than the {positions} tokens that the model can take; "
            f"`kochat data clean FILE --fix overlong --max-length {positions} --tokenizer MODEL` leaves them out"
        )
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = [0.0] * len(ids)
    for start in tqdm(range(0, len(ids), batch_size), desc="scoring", delay=2, leave=False):
        places = by_length[start : start + batch_size]
        rows = [{"input_ids": ids[i]} for i in places]
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        for i, score in zip(places, found.tolist(), strict=True):
            scores[i] = score
    if bad := sum(not math.isfinite(score) for score in scores):
        raise UserError(f"the scores of {bad} of {len(ids)} texts are not finite numbers; the model is broken")
    return scores


def load_scorer(path: str, loading: Loading, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The reward model `path` with its weights in float32, int8 or nf4, on the GPU if there is one.

    On a CPU it computes in float64, so that a score doesn't depend on its batch. In float32 a batch of another shape
    rounds the last bits in another way, and int8 makes a whole step of such a bit, which moved scores by up to 0.002.
    (GPUs for games are slow in float64.) int8 is without bitsandbytes' outlier threshold, by which the rows of a batch
    change each other: at its default of 6 they moved by up to 0.04.
    """
    model: Any = load_reward_model(path, ModelArguments(dtype="float32", **LOADING[loading]), tokenizer)
    model = model.to(PartialState().device)
    if model.device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
    return model
