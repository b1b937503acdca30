"""Which attention runs and how its kernel is called: the one place that tells the kernels apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from echo_ext import _cpu, _native
from echo_ext._dispatch import why_not_kernel
from echo_ext.rope import why_not_table

Backend = Literal["auto", "kernel", "kernel_sm90", "kernel_sm80", "kernel_cpu", "library", "reference"]
Way = Literal["kernel_sm90", "kernel_sm80", "kernel_cpu", "library", "reference"]
BACKENDS = ("auto", "kernel", "kernel_sm90", "kernel_sm80", "kernel_cpu", "library", "reference")


class Inputs(NamedTuple):
    """What the op attends with: runs of keys that hold any, those that meet the turned query first."""

    q: Tensor
    shift: Tensor | None
    runs: list[tuple[str, Tensor, Tensor]]  # name, keys, values
    turned: int
    scale: float


def inputs(
    q: Tensor, shift: Tensor | None, tiers: list[tuple[str, Tensor | None, Tensor | None]], scale: float
) -> Inputs:
    """Drop the tiers without keys; the last of three tiers is the one that the query meets as it is."""
    runs = [(name, k, v) for name, k, v in tiers if k is not None and v is not None and k.shape[1]]
    turned = 0 if shift is None else sum(name != tiers[-1][0] for name, _, _ in runs)
    return Inputs(q, shift if turned else None, runs, turned, scale)


def choose(backend: Backend, x: Inputs) -> Way:
    """The way a call runs.

    Raises:
        ValueError: no such backend.
        RuntimeError: a kernel was asked for by name and can't run; says why.
    """
    if backend not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS[:-1]))
        raise ValueError(f"stream_attention: backend must be {names} or {BACKENDS[-1]!r}, got {backend!r}")
    if backend == "library" or backend == "reference":
        return backend
    if backend == "kernel_sm80" or backend == "kernel_sm90" or backend == "kernel_cpu":
        if reason := _WHY_NOT[backend](x):
            raise RuntimeError(f"stream_attention: {backend} can't run: {reason}")
        return backend
    for name, why_not in _WHY_NOT.items():
        if name == "kernel_cpu" and (backend == "kernel" or _cpu.library_is_faster(x.q)):
            continue
        if why_not(x) is None:
            return name
    if backend == "kernel":
        raise RuntimeError(f"stream_attention: kernel can't run: {why_not_kernel_sm80(x)}")
    return "reference"


def on_device(device: int) -> str:
    """Say which attention a device runs, and why."""
    general = "kernel_sm80"
    if reason := _why_not_hopper(device):
        return f"{general}, as {reason}"
    return f"kernel_sm90 for float16 and bfloat16 with head dim 64 or 128, as this is sm_90; else {general}"


def run(name: Way, x: Inputs) -> tuple[Tensor, Tensor]:
    """Launch a kernel that :func:`choose` named; output ``(B, Tq, H, d)`` and LSE ``(B, H, Tq)``."""
    if name == "kernel_cpu":
        tiers = {tier: (k, v) for tier, k, v in x.runs}
        sink, memory, ring = (tiers.get(tier) for tier in ("sink", "memory", "ring"))
        out, lse = _cpu.attention(x.q, x.shift, sink, memory, ring, x.scale, want_lse=True)
        assert lse is not None
        return out, lse
    sm90 = name == "kernel_sm90"
    b, t, h, _ = x.q.shape
    out = x.q.new_empty(x.q.shape)
    lse = x.q.new_empty((b, h, t), dtype=torch.float32)
    if not out.numel():
        return out, lse
    native, processors = _native.module(), _native.processors(x.q.device)
    tokens = [k.shape[1] for _, k, _ in x.runs]
    dtype = _native.DTYPE_CODE[x.q.dtype]
    floats = native.stream_attention_workspace(dtype, tuple(x.q.shape), tokens, processors, sm90)
    workspace = lse.new_empty(floats) if floats else None
    native.stream_attention_fwd(
        sm90,
        _native.view(x.q),
        None if x.shift is None else _native.view(x.shift),
        [(_native.view(k), _native.view(v)) for _, k, v in x.runs],
        x.turned,
        x.scale,
        _native.view(out),
        _native.view(lse),
        None if workspace is None else _native.view(workspace),
        processors,
        _native.stream_of(x.q),
    )
    return out, lse


def why_not_address(way: Way, x: Inputs) -> str | None:
    """What only the op itself may ask: tracing knows no addresses."""
    if way not in ("kernel_sm80", "kernel_sm90"):
        return None
    for name, tensor in _named(x):
        if tensor.data_ptr() % 16:
            return f"{name} is not aligned to 16 bytes"
    return None


def _named(x: Inputs) -> list[tuple[str, Tensor]]:
    return [("q", x.q), *((f"{name} {kind}", t) for name, k, v in x.runs for kind, t in (("keys", k), ("values", v)))]


def why_not_kernel_sm80(x: Inputs) -> str | None:
    """The first reason the kernel that takes the most can't run, or None if it can."""
    if reason := why_not_kernel("stream_attention", x.q, "q"):
        return reason
    if x.q.shape[-1] not in (16, 64, 128):
        return f"head dim {x.q.shape[-1]} is not built, only 16, 64 and 128"
    if not x.scale > 0:
        return f"scale {x.scale} is not above 0"
    for name, tensor in _named(x):
        if any(s * tensor.element_size() % 16 for s in _steps(tensor)):
            return f"{name} has rows that are not aligned to 16 bytes: strides {tensor.stride()}"
    return None if x.shift is None else why_not_table(x.shift, "shift")


def _why_not_sm90(x: Inputs) -> str | None:
    if reason := why_not_kernel_sm80(x):
        return reason
    if x.q.dtype == torch.float32:
        return "float32 has no tensor core path of its precision"
    if x.q.shape[-1] == 16:
        return "head dim 16 is not built, only 64 and 128"
    for name, tensor in _named(x):
        if 0 in _steps(tensor):
            return f"{name} repeats memory, which TMA can't: strides {tensor.stride()}"
    return _why_not_hopper(x.q.device.index)


def _why_not_cpu(x: Inputs) -> str | None:
    return _cpu.why_not_attention(x.q, x.shift, x.scale)


def _why_not_hopper(device: int) -> str | None:
    if not _native.module().with_sm90a:
        return "this build has no kernels for sm_90a"
    major, minor = (9, 0) if _native.emulated() else _native.capability(device)
    return None if (major, minor) == (9, 0) else f"this is sm_{major}{minor}, not sm_90"


def _steps(x: Tensor) -> list[int]:
    """Strides of the dims that are walked."""
    return [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]


# In the order of preference where several can run.
_WHY_NOT: dict[Way, Callable[[Inputs], str | None]] = {
    "kernel_sm90": _why_not_sm90,
    "kernel_sm80": why_not_kernel_sm80,
    "kernel_cpu": _why_not_cpu,
}
