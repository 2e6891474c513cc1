"""Sampling on every architecture of benchmarks/architectures.py: batch, cache and padding against rows alone."""

from benchmarks.architectures import ARCHITECTURES, make_config
from kochat_trl.models.heads import lm_head
from kochat_trl.ppo.roles import Role
from kochat_trl.ppo.rollout import sample_responses

import pytest
import torch
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 9, 30, 7, 40], [11, 4], [3, 8, 70], [200, 13, 1, 17, 44, 60, 2, 9, 12, 31]]
STOPS = set(range(0, 288, 6))  # so that rows end at different steps
LENGTH = 12


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("answers", [1, 3])  # to each prompt: four rows together, and refilled ones
@torch.no_grad()
def test_a_response_is_drawn_from_what_the_model_says_of_its_row(name, answers):
    """Each token is the one where the running sum of a full pass over the row, without cache, passes its number."""
    torch.manual_seed(0)
    config = make_config(name)
    text = config.get_text_config()
    if answers > 1 and getattr(text, "sliding_window", None):
        text.sliding_window = 5
    model = AutoModelForCausalLM.from_config(config).eval()
    role = Role(model, lm_head(model), None)
    prompts = [prompt for prompt in PROMPTS for _ in range(answers)]
    sampled = sample_responses(role, prompts, range(len(prompts)), LENGTH, 1.0, STOPS, 4)
    assert min(map(len, sampled)) < LENGTH
    for seed, (prompt, response) in enumerate(zip(prompts, sampled, strict=True)):
        assert not STOPS & set(response[:-1])
        assert len(response) == LENGTH or response[-1] in STOPS
        uniform = torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        running = torch.nn.functional.pad(logits.softmax(-1).double().cumsum(-1), (1, 0))
        steps, tokens = torch.arange(len(response)), torch.tensor(response)
        assert (running[steps, tokens] - 1e-4 <= uniform[steps]).all()
        assert (uniform[steps] <= running[steps, tokens + 1] + 1e-4).all()
