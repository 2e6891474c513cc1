"""A base larger than a card: its frozen weights divided among processes (FSDP2), and what is trained whole on each.

Every process holds its share of each block, and gathers a block while it computes. Adapters and heads stay whole, so
optimizers, checkpoints and files are those of a run without sharding, whatever the number of processes. So do the
embeddings, which a head may share.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kochat_trl.errors import UserError

import torch
import torch.distributed
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shard_blocks(model: Any) -> None:
    """Freeze `model`, and divide the weights of its blocks among all processes; one process has nobody to share with.

    Adapters that are put on it afterwards aren't divided. Raises `UserError` where no blocks of transformers' are.
    """
    model.requires_grad_(False)
    state = PartialState()
    if state.num_processes == 1:
        return
    backbone = getattr(model, model.base_model_prefix)
    blocks = blocks_of(backbone)
    if not blocks:
        raise UserError(f"shard_base: {type(backbone).__name__} has no blocks that are known here")
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    in_4bit: list[Any] = [module for module in backbone.modules() if isinstance(module, Linear4bit)]
    known = [(module.weight.compress_statistics, module.weight.quant_type) for module in in_4bit]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    for module, of_weight in zip(in_4bit, known, strict=True):  # PEFT asks the weight
        module.weight.compress_statistics, module.weight.quant_type = of_weight
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(backbone, mesh=mesh, ignored_params=whole)  # has no share: it is where the blocks hear of each other
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nothing is added to it


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the layers of a transformer, whole."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def keep_from_ddp(model: Any) -> None:
    """Let torch's DistributedDataParallel leave alone what is divided."""
    shares = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    model._ddp_params_and_buffers_to_ignore = shares


@contextmanager
def in_step(backbone: nn.Module | None) -> Iterator[None]:
    """Forward passes without gradients, of which processes may have different numbers.

    A divided backbone goes forward on all processes at once: those that are done go on with a token of no meaning
    until the last is.
    """
    if not isinstance(backbone, FSDPModule):
        yield
        return

    def tell(*unused: Any) -> None:
        _is_any(going=True)

    hook = backbone.register_forward_pre_hook(tell)
    try:
        yield
    finally:
        hook.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=PartialState().device)
    while _is_any(going=False):
        backbone(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)


def _is_any(going: bool) -> bool:
    count = torch.tensor(float(going), device=PartialState().device)
    torch.distributed.all_reduce(count)
    return count.item() > 0
