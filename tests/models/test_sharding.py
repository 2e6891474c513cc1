"""What a process holds of a divided base, and what it computes, on every architecture."""

from benchmarks.architectures import ARCHITECTURES, make_config
from kochat_trl.models.loading import add_lora
from kochat_trl.models.sharding import in_step, keep_from_ddp, shard_blocks
from kochat_trl.settings.keys import ModelArguments
from tests.processes import in_processes

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

OTHERS = [name for name in ARCHITECTURES if name != "gpt2"]
LORA = ModelArguments(use_peft=True, lora_r=2, lora_dropout=0.0, dtype="float32")


def adapted(name, divided):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name))
    if divided:
        shard_blocks(model)
    torch.manual_seed(1)
    return add_lora(model, LORA)


def gradients(model, wrap=lambda model: model):
    ids = torch.arange(4, 24).reshape(2, 10)
    wrap(model)(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def computes_what_the_whole_does(name):
    model = adapted(name, divided=True)
    shares = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert shares
    assert not any(p.requires_grad for p in shares)
    of_blocks = sum(share.numel() for share in shares)
    held = sum(share.to_local().numel() for share in shares)
    assert held <= 0.6 * of_blocks  # weights with an odd number of rows don't halve
    keep_from_ddp(model)
    found, expected = gradients(model, DistributedDataParallel), gradients(adapted(name, divided=False))
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 1e-5 * largest, key


def goes_on_until_the_others_are_done(name):
    """Each process makes another number of passes, and gets what it would alone."""
    model = adapted(name, divided=True)
    alone = adapted(name, divided=False)
    backbone = model.get_base_model().model
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad(), in_step(backbone):
        for row in range(2 * PartialState().process_index):
            found = backbone(input_ids=ids[row % 2, None]).last_hidden_state
            expected = alone.get_base_model().model(input_ids=ids[row % 2, None]).last_hidden_state
            assert torch.allclose(found, expected, atol=1e-5)


def begun(function, name):
    torch.set_num_threads(1)
    PartialState(cpu=True)
    function(name)


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_divided_base_computes_what_the_whole_does(name, tmp_path):
    in_processes(2, tmp_path / "log", begun, computes_what_the_whole_does, name)


def test_a_process_goes_on_until_the_others_are_done(tmp_path):
    in_processes(2, tmp_path / "log", begun, goes_on_until_the_others_are_done, "llama")
