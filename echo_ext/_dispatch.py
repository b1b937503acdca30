"""What every op does before it runs: say why its kernel can't, or pick the way that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from echo_ext import _native

Backend = Literal["auto", "kernel", "reference"]


def why_not_kernel(op: str, x: Tensor, name: str) -> str | None:
    """The first reason the CUDA kernel of ``op`` can't take ``x``, or None if it can."""
    if x.device.type != ("cpu" if _native.emulated() else "cuda"):
        return f"{name} is on {x.device}"
    if reason := _native.why_no_kernels():
        return reason
    if not hasattr(_native.module(), f"{op}_fwd"):
        return f"this build has no {op} kernel"
    if x.dtype not in _native.DTYPE_CODE:
        return f"dtype {x.dtype} is not built"
    return None


def use_reference(op: str, backend: Backend, reason: str | None) -> bool:
    """Whether the PyTorch implementation runs; raises where a kernel was asked for by name and can't."""
    if backend not in ("auto", "kernel", "reference"):
        raise ValueError(f"{op}: backend must be 'auto', 'kernel' or 'reference', got {backend!r}")
    if backend == "kernel" and reason:
        raise RuntimeError(f"{op}: kernel can't run: {reason}")
    return backend == "reference" or bool(reason)


def register(
    lib: torch.library.Library, op: str, *, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable
) -> None:
    """Make ``kernel`` the op on CUDA and ``reference`` on the CPU, except where kernels are emulated there."""

    def on_cpu(*args: Any) -> Any:
        return (kernel if _native.emulated() else reference)(*args)

    lib.impl(op, kernel, "CUDA")
    lib.impl(op, on_cpu, "CPU")
    torch.library.register_fake(f"echo_ext::{op}", fake, lib=lib)
