"""Answers from a causal LM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .data.convert import encode_prompts


@dataclass(frozen=True)
class Answer:
    """A response, and whether the model ended it itself (as against running into the length limit)."""

    text: str
    ended: bool


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Answer]:
    """Answer each prompt, templated, by sampling from the whole distribution; greedily at temperature 0.

    Every generation setting is given here, so nothing leaks in from a saved generation config. The result is the same
    for the same seed, batch size and order of prompts.
    """
    torch.manual_seed(seed)
    model.eval()
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[Answer] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="answering", leave=False):
        rows = [{"input_ids": ids} for ids in encode_prompts(tokenizer, prompts[start : start + batch_size])]
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        for ids in output.tolist():
            ended = tokenizer.eos_token_id in ids
            end = ids.index(tokenizer.eos_token_id) if ended else len(ids)
            answers.append(Answer(str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip(), ended))
    return answers
