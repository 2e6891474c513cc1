"""One matrix product, x Wᵀ + b, by whichever of the libraries under torch is the faster."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**18  # weights; calling oneDNN takes some 25 µs, which a smaller product takes altogether


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, inputs), W (outputs, inputs), in any layout, and b (outputs,) → (…, outputs); no autograd goes through it.

    On x86 torch hands products of float32 to MKL, which on an AMD processor takes up to 2.5 times as long as oneDNN,
    the longer the fewer rows, as in sampling (`benchmarks/ppo.py --products`). Uncompiled code has no other way to it.
    """
    large = weight.numel() >= LARGE and x.numel() > x.shape[-1]
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if large and fits and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
