"""The processes of a run under torchrun: who this one is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


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

    def share(self, value: T) -> T:
        """Return what the first process has."""
        if self.mesh is None:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


def join_ranks() -> Ranks:
    """Return this process's place: of torchrun's, where it started this process, else alone.

    A GPU is used where there is one; tensors there travel over NCCL, those of the CPU over gloo.
    """
    gpu = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(device=torch.device("cuda" if gpu else "cpu"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return Ranks(distributed.get_rank(), world, device, init_device_mesh(device.type, (world,)))


def leave_ranks() -> None:
    """End what :func:`join_ranks` began."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
