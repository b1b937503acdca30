"""The compiled module's kernels for CPUs: whether they can run, and the calls themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ext import _native

KV = tuple[Tensor, Tensor]

_HEAD_DIM_STEP, _MAX_HEAD_DIM = 16, 256


def why_not_attention(q: Tensor, shift: Tensor | None, scale: float) -> str | None:
    """The first reason the CPU kernel can't take checked arguments, or None if it can."""
    if not q.is_cpu:
        return f"q is on {q.device}"
    isa, reason = _native.cpu_isa(q.dtype)
    if isa is None:
        return reason
    d = q.shape[-1]
    if d % _HEAD_DIM_STEP or not 0 < d <= _MAX_HEAD_DIM:
        return f"head dim {d} is no multiple of {_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}"
    if not scale > 0:
        return f"scale {scale} is not above 0"
    if shift is not None and shift.dtype != torch.float32:
        return f"shift is {shift.dtype}"
    return None


def attention(
    q: Tensor,
    shift: Tensor | None,
    sink: KV | None,
    memory: KV | None,
    ring: KV | None,
    scale: float,
    *,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel: output ``(B, Tq, H, d)`` and, where wanted, LSE ``(B, H, Tq)``."""
    view = _native.view
    b, t, h, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, h, t), dtype=torch.float32) if want_lse else None
    _native.module().stream_attention_cpu(
        view(q),
        None if shift is None else view(shift.contiguous()),
        None if sink is None else (view(sink[0]), view(sink[1])),
        None if memory is None else (view(memory[0]), view(memory[1])),
        None if ring is None else (view(ring[0]), view(ring[1])),
        view(out),
        None if lse is None else view(lse),
        scale,
        torch.get_num_threads(),
    )
    return out, lse
