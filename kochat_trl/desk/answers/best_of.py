"""Best-of-n: of n sampled answers to a prompt, the one that a reward model scores highest."""

import math
from collections.abc import Sequence
from typing import Any

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import Response, generate_answers
from kochat_trl.errors import UserError
from kochat_trl.reward.score import score_ids
from kochat_trl.rows.encode import encode_prompts

from transformers import PreTrainedTokenizerBase


def kl_of_best(n: int) -> float:
    """KL, in nats a response, of the best of `n` answers from the distribution that they are drawn from, at most:
    log n − (n−1)/n.

    It is exact where no two draws score alike (Stiennon et al. 2020, appendix G.3). Where answers repeat, the KL is
    less: the formula is an upper bound (Beirami et al. 2024, 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    n: int,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[Response]]:
    """`n` answers to each prompt, by `settings` of `decoding`.

    Raises `UserError` as `generate_answers` does, and for more than one answer without sampling.
    """
    if n < 1:
        raise UserError(f"found {n} answers to a prompt, expected 1 or more")
    if n > 1 and not settings["do_sample"]:
        raise UserError(f"without sampling all {n} answers to a prompt are equal; choose --decoding sample, or top_p")
    repeated = [prompt for prompt in prompts for _ in range(n)]
    answers = generate_answers(model, tokenizer, repeated, settings, batch_size, seed)
    return [answers[start : start + n] for start in range(0, len(answers), n)]


def best_of(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    n: int,
    scorer: Any,
    batch_size: int = 64,
    seed: int = 0,
) -> list[tuple[Response, float]]:
    """The best of `n` answers to each prompt, the first of equal ones, and its score.

    `scorer` is a reward model over the same vocabulary; it reads what was generated, also where no end was. Raises as
    `sample_answers` does.
    """
    found = sample_answers(model, tokenizer, prompts, settings, n, batch_size, seed)
    prompt_ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    full = [[*ids, *answer.ids] for ids, its in zip(prompt_ids, found, strict=True) for answer in its]
    scores = iter(score_ids(scorer, tokenizer, full, batch_size))
    return [max(((answer, next(scores)) for answer in its), key=lambda scored: scored[1]) for its in found]
