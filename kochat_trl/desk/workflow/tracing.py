"""Bytes that are alive while a model computes on fake tensors, and what such tensors answer about their values."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, and the most that there were since `restart`, as operations pass by."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.now = self.logits = self.gradients = 0
        self._has_gradient: set[int] = set()
        self._alive: dict[int, Any] = {}
        self.restart()

    def restart(self) -> None:
        self.peak, self.logits_at_peak, self.gradients_at_peak = self.now, self.logits, self.gradients

    def note_gradient(self, weight: Tensor) -> None:
        """A weight's gradient is there, or has grown by another's; it is among the live bytes already."""
        if id(weight) not in self._has_gradient:
            self._has_gradient.add(id(weight))
            self.gradients += weight.untyped_storage().nbytes()

    def add(self, tensors: Any) -> None:
        """Follow these tensors until they are gone."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (key := storage_of(tensor)) not in self._alive:
                storage = tensor.untyped_storage()
                size, over_vocabulary = storage.nbytes(), tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size
                self.now += size
                self.logits += size * over_vocabulary
                self._alive[key] = weakref.ref(storage, partial(self._drop, key, size, over_vocabulary))
        if self.now > self.peak:
            self.restart()

    def _drop(self, key: int, size: int, over_vocabulary: bool, _: Any) -> None:
        del self._alive[key]
        self.now -= size
        self.logits -= size * over_vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.add(result)
        return result


class NoValues(TorchFunctionMode):
    """Answers what code asks of a tensor's values as if all were 1 or True: no padding, no response that ends early.

    Of a vector of truths, such as KTO's labels, the places of half are given: the other half is asked for too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "__bool__", "__int__", "__float__", "__index__"):
            return name in ("item", "__bool__") or 1
        if name in ("allclose", "equal"):
            return True
        if name == "tolist":
            return _ones(args[0].shape)
        if name == "nonzero":
            mask = args[0] if args[0].ndim > 1 else args[0][::2]
            places = torch.meshgrid(*(torch.arange(n, device=mask.device) for n in mask.shape), indexing="ij")
            flat = tuple(place.reshape(-1) for place in places)
            return flat if (kwargs or {}).get("as_tuple") else torch.stack(flat, -1)
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].ndim - 1).clone()
        return func(*args, **kwargs or {})


def _ones(shape: Sequence[int]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {storage_of(t): t for t in tensors}.values())


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Weights, buffers, and the scales of quantized weights."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for holder in (getattr(module, "state", None), getattr(module, "weight", None)):
            yield from (t for t in (getattr(holder, "SCB", None),) if isinstance(t, Tensor))
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:  # double quantization has a state of the scales
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
            state = state.state2


def materialize(model: nn.Module) -> None:
    """Put fake tensors, quantized as bitsandbytes does it, in the place of a model's weights on the meta device."""
    fake = cache(_fake)  # a tied weight stays one
    for module in model.modules():
        weights: Any
        for weights in (module._parameters, module._buffers):
            weights |= {name: fake(weight) for name, weight in weights.items() if weight is not None}
    model.to = lambda *device: model  # type: ignore[method-assign]  # Trainers move it to where it is; fakes can't be


def _fake(weight: Any) -> Any:
    fake: Any = torch.empty(weight.shape, dtype=weight.dtype)
    if not isinstance(weight, nn.Parameter):
        return fake
    if isinstance(weight, Int8Params):
        values, scales, _ = bnb.int8_vectorwise_quant(fake.half())
        fake = nn.Parameter(values, requires_grad=False)
        fake.CB, fake.SCB, fake.has_fp16_weights = fake.data, scales, False
        return fake
    if isinstance(weight, Params4bit):
        settings = {"blocksize": weight.blocksize, "quant_type": weight.quant_type}
        values, state = bnb.quantize_4bit(fake, compress_statistics=weight.compress_statistics, **settings)
        fake = nn.Parameter(values, requires_grad=False)
        fake.quant_state, fake.bnb_quantized = state, True
        return fake
    return nn.Parameter(fake, requires_grad=weight.requires_grad)
