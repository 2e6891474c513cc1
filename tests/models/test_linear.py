"""The product of oneDNN against float64, and where it is used."""

from kochat_trl.models import linear as module
from kochat_trl.models.fused import fuse_lora
from kochat_trl.models.heads import LMHead, lm_head
from kochat_trl.models.linear import LARGE, linear
from kochat_trl.models.loading import has_conv1d

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

SIZE = 520  # inputs and outputs: above LARGE weights


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products(monkeypatch):
    """The shapes of x that oneDNN was given."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    shapes, inner = [], torch.ops.mkldnn._linear_pointwise

    def counted(x, *rest):
        shapes.append(tuple(x.shape))
        return inner(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return shapes


@pytest.mark.parametrize("bias", [None, random(SIZE, seed=2)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(2,), (3, 5), (0,), (4, 1), (130,)])
def test_values(shape, bias, products):
    x, weight = random(*shape, SIZE, seed=1), random(SIZE, SIZE)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    transposed = weight.T.contiguous().T  # as GPT-2's layers have it
    for given in (x, random(*shape, SIZE + 3, seed=3)[..., :SIZE].copy_(x)):  # rows side by side, and apart
        for its in (weight, transposed):
            torch.testing.assert_close(linear(given, its, bias).double(), exact, atol=1e-4, rtol=1e-5)
    assert products == [(*shape, SIZE)] * (4 if x.numel() else 0)


@pytest.mark.parametrize(
    ("rows", "size", "dtype"),
    [
        pytest.param(1, SIZE, torch.float32, id="one row"),
        pytest.param(4, int(LARGE**0.5) - 1, torch.float32, id="few weights"),
        pytest.param(4, SIZE, torch.float64, id="float64"),
        pytest.param(4, SIZE, torch.bfloat16, id="bfloat16"),
    ],
)
def test_where_torch_is_the_faster_or_the_only_one_it_is_torch(rows, size, dtype, products):
    x, weight = random(rows, size, seed=1).to(dtype), random(size, size).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not products


def test_without_onednn_it_is_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight = random(4, SIZE, seed=1), random(SIZE, SIZE)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_lora_model_gives_the_same_numbers_and_gradients(products, monkeypatch):
    """GPT-2's layers, transposed, under LoRA, forward and backward; the head over the vocabulary without gradient."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, eos_token_id=1, n_embd=SIZE, n_layer=1, n_head=4, n_positions=16)
    bare = GPT2LMHeadModel(config).eval()
    assert has_conv1d(bare)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(bare, lora)
    fuse_lora(model)
    ids = torch.arange(12).view(2, 6)

    def run():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        learned = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            logits = lm_head(model)(hidden)
        return [hidden, logits, *torch.autograd.grad((hidden * random(*hidden.shape)).sum(), learned)]

    with_onednn = run()
    assert len(products) == 4 + 1 + 3  # the layers forward, the head, and the layers that have one before them backward
    monkeypatch.setattr(module, "LARGE", 2**30)
    for ours, torchs in zip(with_onednn, run(), strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-3, rtol=1e-4)


def test_a_head_that_learns_has_its_gradient():
    """The product without autograd is no part of a pass with gradients."""
    head = LMHead(nn.Linear(SIZE, SIZE, bias=False))
    x = random(4, SIZE).requires_grad_()
    head(x).square().sum().backward()
    assert x.grad is not None
    assert head.linear.weight.grad.abs().sum() > 0
