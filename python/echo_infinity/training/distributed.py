"""Training on several processes under torchrun: the DiT is sharded with FSDP2, everything small is kept whole.

Every process draws the same random numbers for the whole batch and computes its own rows, so that a run on several
processes does the same arithmetic as one on one, but for the order of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from echo_infinity.model import CausalDiT
from echo_infinity.ranks import Ranks


def shard(ranks: Ranks, model: CausalDiT) -> None:
    """Shard a DiT in place, each block on its own; on one process it is left as it is."""
    if ranks.mesh is None:
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # never changed
    for block in model.layers():
        fully_shard(block, mesh=ranks.mesh)
        for method in ("encode_text", "condition"):
            register_fsdp_forward_method(block, method)
    fully_shard(model, mesh=ranks.mesh)
    for method in ("encode_text", "condition"):
        register_fsdp_forward_method(model, method)


def average_gradients(ranks: Ranks, parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are kept whole, in one message; FSDP has averaged the others."""
    if ranks.mesh is None:
        return
    kept = [x for x in parameters if x.requires_grad and not isinstance(x, DTensor)]
    if not kept:
        return
    # What no process reached keeps no gradient, as alone: an optimiser leaves it as it is.
    reached = ranks.total(torch.tensor([float(x.grad is not None) for x in kept], device=ranks.device)).tolist()
    kept = [x for x, count in zip(kept, reached, strict=True) if count]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in kept]
    if not grads:
        return
    flat = ranks.total(torch.cat([grad.flatten() for grad in grads])) / ranks.world
    for x, mean in zip(kept, flat.split([x.numel() for x in kept]), strict=True):
        x.grad = mean.view_as(x)


def whole(x: Tensor) -> Tensor:
    """Return a tensor with all its shards on the CPU; every process must ask for it."""
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()


def spread(x: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor as ``like`` is: the same shards, on the same device; counters stay where they are."""
    if not x.ndim:
        return x
    if isinstance(like, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x.to(like.device)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scale gradients so that their joint norm is at most ``most``; return the norm they had."""
    grads = [x.grad for x in parameters if x.grad is not None]
    shards = [g for g in grads if isinstance(g, DTensor)]
    rest = [g for g in grads if not isinstance(g, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, most).item()
    parts: list[Any] = [nn.utils.get_total_norm(shards), *([nn.utils.get_total_norm(rest)] if rest else [])]
    norm = torch.stack([whole(part) for part in parts]).norm().item()
    scale = min(1.0, most / (norm + 1e-6))
    for grad in grads:
        grad.mul_(scale)
    return norm
