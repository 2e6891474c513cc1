"""Scores of a reward model."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data.convert import Messages, encode_dialogues


@torch.no_grad()
def score_dialogues(
    model: Any, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages], batch_size: int = 64
) -> list[float]:
    """The reward model's score of each dialogue, read at its last token, the one that ends the answer.

    Dialogues are batched by length and padded on the right; the scores come back in the order given.
    """
    model.eval()
    ids = [input_ids for input_ids, _ in encode_dialogues(tokenizer, dialogues)]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = [0.0] * len(ids)
    for start in tqdm(range(0, len(ids), batch_size), desc="scoring", delay=2, leave=False):
        places = by_length[start : start + batch_size]
        rows = [{"input_ids": ids[i]} for i in places]
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
        for i, score in zip(places, model(**batch).logits[:, 0].tolist(), strict=True):
            scores[i] = score
    return scores
