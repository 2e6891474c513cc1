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
@torch.no_grad()
def test_a_response_is_drawn_from_what_the_model_says_of_its_row(name):
    """Each token is the one where the running sum of a full pass over the row, without cache, passes its number."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name)).eval()
    role = Role(model, lm_head(model), None)
    sampled = sample_responses(role, PROMPTS, range(4), LENGTH, 1.0, STOPS, batch_size=4)
    assert min(map(len, sampled)) < LENGTH
    for seed, (prompt, response) in enumerate(zip(PROMPTS, sampled, strict=True)):
        assert not STOPS & set(response[:-1])
        assert len(response) == LENGTH or response[-1] in STOPS
        uniform = torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        running = torch.nn.functional.pad(logits.softmax(-1).double().cumsum(-1), (1, 0))
        steps, tokens = torch.arange(len(response)), torch.tensor(response)
        assert (running[steps, tokens] - 1e-4 <= uniform[steps]).all()
        assert (uniform[steps] <= running[steps, tokens + 1] + 1e-4).all()
