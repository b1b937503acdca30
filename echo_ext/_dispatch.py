"""What every op does before it runs: say why its kernel can't, or pick the way that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from echo_ext import _native

Backend = Literal["auto", "kernel", "reference"]
MAX_ROW_BYTES = 768 * 32  # of a token that a block of threads holds: csrc/common/block_row.cuh


def why_not_kernel(op: str, x: Tensor, name: str) -> str | None:
    """The first reason the CUDA kernel of ``op`` can't take ``x``, or None if it can."""
    if not (x.is_cpu if _native.emulated() else x.is_cuda):
        return f"{name} is on cpu" if x.is_cpu else f"{name} is on {x.device}"  # asking a device's name takes longer
    if reason := _native.why_no_kernels():
        return reason
    if not hasattr(_native.module(), f"{op}_fwd"):
        return f"this build has no {op} kernel"
    if x.dtype not in _native.DTYPE_CODE:
        return f"dtype {x.dtype} is not built"
    return None


def without_cuda_kernel(op: str, backend: Backend, reason: str | None) -> bool:
    """Whether the CUDA kernel stays out, for ``reason`` or as asked; raises where it was asked for by name and can't.

    What runs then is PyTorch, or with ``"auto"`` the op's kernel for CPUs if it has one.
    """
    if backend not in ("auto", "kernel", "reference"):
        raise ValueError(f"{op}: backend must be 'auto', 'kernel' or 'reference', got {backend!r}")
    if backend == "kernel" and reason:
        raise RuntimeError(f"{op}: kernel can't run: {reason}")
    return backend == "reference" or bool(reason)


def why_not_vectors(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The first tensor whose rows can't be read 16 bytes at a time, or None where all can."""
    for name, x in tensors.items():
        if x is None:
            continue
        width = 16 // x.element_size()
        if x.shape[-1] % width:
            return f"the last dim of {name} is {x.shape[-1]}, no multiple of {width}"
        if x.stride(-1) != 1:
            return f"the last dim of {name} is strided"
        # While it compiles, torch can't ask where a tensor starts; the binding raises where that was wrong.
        start = 0 if torch.compiler.is_compiling() else x.storage_offset()
        steps = [step for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
        if any(step % width for step in (start, *steps)):
            return f"rows of {name} don't start at multiples of 16 bytes"
    return None


def register(
    lib: torch.library.Library, op: str, *, kernel: Callable[..., Any], cpu: Callable[..., Any], fake: Callable
) -> None:
    """Make ``kernel`` the op on CUDA, and ``cpu`` on the CPU, except where CUDA kernels are emulated there.

    ``cpu`` is the reference, or takes a kernel for CPUs where that can run.
    """

    def on_cpu(*args: Any) -> Any:
        return (kernel if _native.emulated() else cpu)(*args)

    lib.impl(op, kernel, "CUDA")
    lib.impl(op, on_cpu, "CPU")
    torch.library.register_fake(f"echo_ext::{op}", fake, lib=lib)
