"""The fused LoRA layer against PEFT's own, in values, gradients, and in when it steps aside."""

import copy
from typing import Any

from kochat_trl.models import fused as module
from kochat_trl.models.fused import fuse_lora

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

IN, OUT, RANK = 6, 10, 2


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def int8_layer(bias):
    """A frozen layer in int8, whose activations stay in float32 while it trains on a CPU."""
    layer = Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False, threshold=0.0)
    layer.weight.data = random(OUT, IN).float()
    return layer.to("cpu")


LAYERS = {
    "linear": lambda bias: nn.Linear(IN, OUT, bias=bias, dtype=torch.float64),
    "conv1d": lambda bias: Conv1D(OUT, IN).double(),  # always with a bias
    "int8": int8_layer,
}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kind="linear", bias=True, **settings):
    """PEFT's model and the same one fused; LoRA's B is not 0."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": RANK, "lora_alpha": 6, "target_modules": ["layer"]} | settings)
    bare: Any = One(LAYERS[kind](bias))
    bare.is_loaded_in_8bit = kind == "int8"  # PEFT has another layer for it
    model = get_peft_model(bare, config, autocast_adapter_dtype=False)
    assert type(model.base_model.model.layer).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear")
    dtype = torch.float32 if kind == "int8" else torch.float64
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.is_floating_point():
            parameter.data = random(*parameter.shape, seed=seed).to(dtype)
        if kind == "int8" and name.endswith("base_layer.bias"):
            parameter.requires_grad_(False)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    return model.train(), fused.train()


def run(model, x):
    """The output, and all gradients, of the elements weighed differently."""
    x = x.clone().requires_grad_()
    y = model(x)
    learned = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), torch.autograd.grad((y * random(*y.shape, seed=9).to(y.dtype)).sum(), learned)


@pytest.fixture
def products(monkeypatch):
    """How often the fused function ran."""
    calls = []
    inner = module._LoraProduct.apply
    monkeypatch.setattr(module._LoraProduct, "apply", lambda *args: calls.append(args) or inner(*args))
    return calls


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (1, IN)])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True), ("int8", True)])
def test_equals_peft(kind, bias, shape, products):
    model, fused = make(kind, bias)
    x = random(*shape, seed=3).to(torch.float32 if kind == "int8" else torch.float64)
    tolerance = 1e-5 if kind == "int8" else 1e-12
    torch.testing.assert_close(run(fused, x), run(model, x), rtol=tolerance, atol=tolerance)
    assert len(products) == 1


def test_int8_is_what_it_was_after_a_backward_pass():
    model, fused = make("int8")
    x = random(4, IN).float()
    first, second = run(fused, x), run(fused, x)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert fused.base_model.model.layer.get_base_layer().state.SCB is not None
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradcheck(kind):
    _, fused = make(kind)
    layer = fused.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = random(3, IN, seed=3).requires_grad_()
    product = module._LoraProduct.apply
    assert torch.autograd.gradcheck(lambda x, a, b: product(x, layer.get_base_layer(), a, b, 3.0), (x, a, b))


def test_only_what_needs_a_gradient_gets_one(products):
    """The first layer's input needs none, and neither does a frozen adapter."""
    model, fused = make()
    x = random(4, IN)
    for m in (model, fused):
        m(x).sum().backward()
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    assert not fused(x).requires_grad
    x.requires_grad_()
    fused(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(model(x).sum(), x)[0])
    assert len(products) == 3


def test_keeps_the_input_and_its_projection_and_no_more():
    """Of a layer's activations: what PEFT keeps too, but not its output twice."""
    _, fused = make()
    kept = []
    x = random(7, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        fused(x)
    assert sorted(kept) == sorted([(7, IN), (7, RANK), (RANK, IN), (OUT, RANK)])


@pytest.mark.parametrize("kind", [nn.GELU, NewGELUActivation, GELUTanh])
def test_the_output_of_an_activation_is_computed_again(kind):
    class AfterActivation(One):
        def forward(self, x):
            return self.layer(self.activation(x))

    model, fused = make()
    for made in (model, fused):
        made.base_model.model.__class__ = AfterActivation
        made.base_model.model.activation = kind()
    fuse_lora(fused)
    x, kept = random(7, IN), []
    torch.testing.assert_close(run(fused, x), run(model, x), rtol=1e-12, atol=1e-12)
    again = torch.utils.checkpoint.checkpoint
    torch.testing.assert_close(run(lambda_model(fused, again), x), run(model, x), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        made_from = fused.base_model.model.activation(x).made_from
        fused(x)
    assert made_from.data_ptr() in kept[-4:]


def test_gradients_with_checkpointing():
    model, fused = make()
    x = random(4, IN)
    again = torch.utils.checkpoint.checkpoint
    torch.testing.assert_close(run(lambda_model(fused, again), x), run(model, x), rtol=1e-12, atol=1e-12)


def lambda_model(model, again):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return again(self.model, x, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_that_are_more_go_pefts_way(settings, products):
    model, fused = make(**settings)
    x = random(4, IN)
    torch.manual_seed(1)
    expected = run(model, x)
    torch.manual_seed(1)
    torch.testing.assert_close(run(fused, x), expected)
    assert not products


def test_dropout_that_is_off_is_none(products):
    model, fused = make(lora_dropout=0.5)
    x = random(4, IN)
    torch.testing.assert_close(run(fused.eval(), x), run(model.eval(), x))
    for m in (model, fused):
        m.train().base_model.model.layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(run(fused, x), run(model, x))
    assert len(products) == 2


def test_several_adapters_and_none(products):
    pair = make()
    for model in pair:
        model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"]))
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.data = random(*parameter.shape, seed=len(name)).double()
    x = random(4, IN)
    for active, fuses in (["default"], 1), (["other"], 1), (["default", "other"], 0), ([], 0), (["absent"], 0):
        for model in pair:
            model.base_model.model.layer._active_adapter = active
        products.clear()
        with torch.no_grad():
            torch.testing.assert_close(pair[1](x), pair[0](x))
        assert len(products) == fuses, active


def test_disabled_and_merged(products):
    model, fused = make()
    x = random(4, IN)
    with model.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    for m in (model, fused):
        m.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert not products


def test_a_base_that_learns(products):
    pair = make()
    for model in pair:
        model.base_model.model.layer.get_base_layer().weight.requires_grad_()
    x = random(4, IN)
    torch.testing.assert_close(run(pair[1], x), run(pair[0], x))
    assert not products


def test_mixed_dtypes_without_autocast(products):
    model, fused = make()
    for m in (model, fused):
        m.base_model.model.layer.get_base_layer().bfloat16()
    x = random(4, IN).bfloat16()
    torch.testing.assert_close(run(fused, x), run(model, x))
    assert not products


def in_dtypes(models, base):
    """LoRA in float32, the frozen layer in `base`, in place."""
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if "lora_" in name else base)


def exact(model, x, weights):
    """What `run` would give in float64, of the layer's own numbers, where the outputs are weighed by `weights`."""
    layer: Any = model.base_model.model.layer
    base = layer.get_base_layer()
    x, a, b = (t.detach().double().requires_grad_() for t in (x, *(p for p in model.parameters() if p.requires_grad)))
    bias = 0 if base.bias is None else base.bias.double()
    y = x @ module._matrix(base).double().T + bias + layer.scaling["default"] * (x @ a.T) @ b.T
    return y.detach(), torch.autograd.grad(y, [x, a, b], weights.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_x", [True, False])
@pytest.mark.parametrize(
    ("kind", "bias", "wide_base"),
    [(kind, True, wide) for kind in ("linear", "conv1d") for wide in (True, False)]
    + [("linear", False, True), ("int8", True, True)],
)
def test_autocast_rounds_as_peft_does_or_less(kind, bias, wide_base, wide_x, dtype, products, monkeypatch):
    """In PEFT's dtypes, and closer to float64 than it or as close; the layer is larger, so that errors are a mean."""
    monkeypatch.setattr(f"{__name__}.IN", 64)
    monkeypatch.setattr(f"{__name__}.OUT", 96)
    pair = make(kind, bias, r=8, lora_alpha=0.1)  # small, so that the base counts
    in_dtypes(pair, torch.float32 if wide_base else dtype)
    x = random(2, 25, IN, seed=3).to(torch.float32 if wide_x else dtype)
    weights = random(2, 25, OUT, seed=9).to(dtype)
    for train in (True, False):  # bitsandbytes has two products
        found = []
        for model in pair:
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype):
                y = model.train(train)(given)
            learned = [given, *(p for p in model.parameters() if p.requires_grad)]
            found.append((y.detach(), *torch.autograd.grad(y, learned, weights.to(y.dtype))))
        y, gradients = exact(pair[0], x, weights)
        for theirs, ours, true in zip(*found, (y, *gradients), strict=True):
            assert ours.dtype == theirs.dtype
            error, allowed = ((t.double() - true).norm() / true.norm() for t in (ours, theirs))
            assert error <= 1.02 * allowed  # rounding is as luck will have it
            assert (ours - theirs).double().norm() <= 2 * torch.finfo(dtype).eps * true.norm()
    assert [gradient.dtype for gradient in found[1][2:]] == [torch.float32] * 2  # of float32 weights
    assert len(products) == 2


def test_autocast_keeps_activations_in_its_dtype(products):
    """And no cast of a weight: of float32 there is but LoRA's own."""
    _, fused = make()
    in_dtypes([fused], torch.float32)
    kept = []

    def note(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    x = random(7, IN).float()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        fused(x.requires_grad_())
    activations = [((7, IN), torch.bfloat16), ((7, RANK), torch.bfloat16)]
    assert sorted(kept, key=str) == sorted(
        [*activations, ((RANK, IN), torch.float32), ((OUT, RANK), torch.float32)], key=str
    )


def test_autocast_with_checkpointing(products):
    _, fused = make()
    in_dtypes([fused], torch.float32)
    x = random(4, IN).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(fused, x)
        torch.testing.assert_close(
            run(lambda_model(fused, torch.utils.checkpoint.checkpoint), x), expected, rtol=0, atol=0
        )
    assert len(products) == 3  # one of them again, in the backward pass


def test_autocast_leaves_other_dtypes_to_peft(products):
    """float64 it doesn't touch, and float16 isn't what it computes in."""
    model, fused = make()
    x = random(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(fused, x), run(model, x))
        in_dtypes((model, fused), torch.float16)
        torch.testing.assert_close(run(fused, x.half()), run(model, x.half()))
    assert not products
