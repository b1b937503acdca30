"""Training on several processes under torchrun: the DiT is sharded with FSDP2, everything small is kept whole.

Every process draws the same random numbers for the whole batch and computes its own rows, so that a run on several
processes does the same arithmetic as one on one, but for the order of sums.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from echo_infinity.model import CausalDiT


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and this one's place among them.

    Args:
        rank: of this process.
        world: how many there are.
        device: where this one computes.
        mesh: of all of them, where there are several.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    def rows(self, batch: int) -> slice:
        """Return this process's rows of a batch.

        Raises:
            ValueError: the batch can't be shared out evenly.
        """
        if batch % self.world:
            raise ValueError(f"a batch of {batch} can't be shared out evenly among {self.world} processes")
        share = batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def shard(self, model: CausalDiT) -> None:
        """Shard a DiT in place, each block on its own; on one process it is left as it is."""
        if self.mesh is None:
            return
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # never changed
        for block in model.layers():
            fully_shard(block, mesh=self.mesh)
            for method in ("encode_text", "condition"):
                register_fsdp_forward_method(block, method)
        fully_shard(model, mesh=self.mesh)
        for method in ("encode_text", "condition"):
            register_fsdp_forward_method(model, method)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            distributed.barrier()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the processes."""
        if self.mesh is None:
            return x
        x = x.detach().clone()
        distributed.all_reduce(x)
        return x

    def join(self, x: Tensor, dim: int | None) -> Tensor:
        """Return the rows ``x`` of all processes along ``dim``; None is the same on all of them."""
        if self.mesh is None or dim is None:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        distributed.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts, dim=dim)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each number over the processes."""
        if self.mesh is None:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, (self.total(numbers) / self.world).tolist(), strict=True))

    def share(self, values: dict[str, float]) -> dict[str, float]:
        """Return what the first process has."""
        if self.mesh is None:
            return values
        box: list[Any] = [values]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of parameters that are kept whole, in one message; FSDP has averaged the others."""
        if self.mesh is None:
            return
        whole = [x for x in parameters if x.requires_grad and not isinstance(x, DTensor)]
        if not whole:
            return
        # What no process reached keeps no gradient, as alone: an optimiser leaves it as it is.
        reached = self.total(torch.tensor([float(x.grad is not None) for x in whole], device=self.device)).tolist()
        whole = [x for x, count in zip(whole, reached, strict=True) if count]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in whole]
        if not grads:
            return
        flat = self.total(torch.cat([grad.flatten() for grad in grads])) / self.world
        for x, mean in zip(whole, flat.split([x.numel() for x in whole]), strict=True):
            x.grad = mean.view_as(x)


def join_ranks() -> Ranks:
    """Return this process's place: of torchrun's, where it started this process, else alone.

    A GPU is used where there is one; processes talk over NCCL then, otherwise over gloo.
    """
    gpu = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(device=torch.device("cuda" if gpu else "cpu"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpu else "gloo")
    return Ranks(distributed.get_rank(), world, device, init_device_mesh(device.type, (world,)))


def leave_ranks() -> None:
    """End what :func:`join_ranks` began."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


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
