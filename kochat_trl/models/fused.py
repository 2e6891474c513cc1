"""LoRA layers with one function for the whole product, forward and backward.

PEFT adds s·B(Ax) to the frozen layer's output in steps, each of which makes a tensor as large as the output. Here the
products add to what is there, and only x and Ax are kept for the backward pass; where x comes from an activation
function, which keeps its own input, not even x. Under autocast they are in its dtype, as are the products; a frozen
float32 weight is cast for each of its two, and the cast is kept by neither.
"""

from typing import Any

from kochat_trl.models.linear import linear

import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear8bitLt as LoraLinear8bitLt
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

ACTIVATIONS = (nn.GELU, GELUActivation, NewGELUActivation, FastGELUActivation, GELUTanh)


def fuse_lora(model: nn.Module) -> None:
    """Let every LoRA layer of `model`, on a float or int8 base, compute in one function, wherever it can.

    That is with one active adapter that is a plain one (no dropout, DoRA or bias) on a frozen layer, in one dtype, or
    under autocast in its dtype and float32. All else goes PEFT's way, as before.
    """
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif isinstance(module, ACTIVATIONS):
            module.register_forward_hook(_tell_origin)


def _tell_origin(activation: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
    if torch.is_grad_enabled():
        output.made_by, output.made_from = activation, inputs[0]


class _Fused:
    """Another forward for PEFT's layers."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain(name, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, self.get_base_layer(), a, b, self.scaling[name])

    def _is_plain(self: Any, name: str, x: Tensor) -> bool:
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        dropout = self.lora_dropout[name]
        if self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return False
        base = self.get_base_layer()
        if type(base) not in (nn.Linear, Conv1D, Linear8bitLt) or any(p.requires_grad for p in base.parameters()):
            return False
        dtypes = {x.dtype, self.lora_A[name].weight.dtype, *(p.dtype for p in base.parameters())} - {torch.int8}
        return len(dtypes) == 1 if (cast := _autocast_dtype(x)) is None else dtypes <= {cast, torch.float32}


class FusedLinear(_Fused, Linear):
    pass


class FusedLinear8bitLt(_Fused, LoraLinear8bitLt):
    pass


FUSED: dict[type, type] = {Linear: FusedLinear, LoraLinear8bitLt: FusedLinear8bitLt}


class _LoraProduct(torch.autograd.Function):
    """y = base(x) + s·(xAᵀ)Bᵀ, where the base is frozen. A number is rounded where PEFT rounds it, or more rarely."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = _autocast_dtype(x) or x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if isinstance(base, Linear8bitLt):
            y = base(x)  # bitsandbytes quantizes what it is given, and may answer in x's dtype
        else:
            bias: Any = base.bias
            y = linear(rows, _matrix(base).to(dtype), bias if bias is None else bias.to(dtype))
            y = y.view(*x.shape[:-1], y.shape[-1])
        low = rows @ a.to(dtype).T
        _add_product(y.view(-1, y.shape[-1]), low, b.to(dtype).T, scale)
        ctx.activation = getattr(x, "made_by", None)
        ctx.save_for_backward(x.made_from if ctx.activation else rows, low, a, b)  # type: ignore[attr-defined]
        ctx.base, ctx.scale, ctx.shape, ctx.dtype = base, scale, x.shape, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, low, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        cast = grad.to(low.dtype)
        grad_low = _scaled_product(cast, b.to(low.dtype), ctx.scale)
        to_x, _, to_a, to_b, _ = ctx.needs_input_grad
        grad_x = grad_a = None
        if to_x:
            dtype = ctx.dtype if isinstance(ctx.base, Linear8bitLt) else low.dtype  # bitsandbytes' own is x's
            grad_x = linear(grad.to(dtype), _matrix(ctx.base).to(dtype).T).to(ctx.dtype)
            grad_x = _add_product(grad_x, grad_low, a.to(low.dtype)).view(ctx.shape)
        if to_a:
            x = ctx.activation(x) if ctx.activation else x
            grad_a = (grad_low.T @ x.reshape(-1, x.shape[-1]).to(low.dtype)).to(a.dtype)
        grad_b = _scaled_product(cast.T, low, ctx.scale).to(b.dtype) if to_b else None
        return grad_x, None, grad_a, grad_b, None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on the device of `x`; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left right, rounded once."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale · left right, in place, where y may have more bits than they."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=scale)
    return y.add_(left @ right, alpha=scale)


def _matrix(base: Any) -> Tensor:
    """The (outputs, inputs) matrix of a layer."""
    if isinstance(base, Linear8bitLt):
        scales: Any = base.state.SCB
        return int8_vectorwise_dequant(base.weight.data, scales)
    return base.weight.T if isinstance(base, Conv1D) else base.weight
