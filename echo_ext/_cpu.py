"""The compiled module's kernels for CPUs: what they can't take, and the calls themselves."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from echo_ext import _native

KV = tuple[Tensor, Tensor]

_HEAD_DIM_STEP, _MAX_HEAD_DIM = 16, 256
_WIDTH_STEP, _MAX_WIDTH = 16, 8192


def why_not_attention(q: Tensor, shift: Tensor | None, scale: float) -> str | None:
    """The first reason the kernel can't take checked arguments of `stream_attention`, or None if it can."""
    if reason := _why_not(q):
        return reason
    if not scale > 0:
        return f"scale {scale} is not above 0"
    if shift is not None and shift.dtype != torch.float32:
        return f"shift is {shift.dtype}"
    return None


def library_is_faster(q: Tensor) -> bool:
    """Whether PyTorch's attention outruns the kernel: it uses AMX in bfloat16, where a CPU has that."""
    return q.dtype == torch.bfloat16 and _native.cpu_has_amx()


def attention(
    q: Tensor,
    shift: Tensor | None,
    sink: KV | None,
    memory: KV | None,
    ring: KV | None,
    scale: float,
    *,
    last_count: int = 1,
    want_lse: bool = False,
    isa: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel, with at most the instruction set ``isa``; the ring's last key counts ``last_count`` times.

    Returns:
        Output ``(B, Tq, H, d)`` and, where wanted, LSE ``(B, H, Tq)`` float32.
    """
    view = _native.view
    b, t, h, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, h, t), dtype=torch.float32) if want_lse else None
    shift = None if shift is None else shift.contiguous()  # a name: views are addresses and keep nothing alive
    _native.module().stream_attention_cpu(
        view(q),
        None if shift is None else view(shift),
        None if sink is None else (view(sink[0]), view(sink[1])),
        None if memory is None else (view(memory[0]), view(memory[1])),
        None if ring is None else (view(ring[0]), view(ring[1])),
        view(out),
        None if lse is None else view(lse),
        scale,
        last_count,
        torch.get_num_threads(),
        isa,
    )
    return out, lse


def why_not_append(*args: Any) -> str | None:
    """The first reason the kernel can't take checked arguments of `ring_append`, or None if it can."""
    q, k, v, q_weight, k_weight, frame_table, key_frame_table, grid_table, _, ring_k, ring_v, ring_raw, _ = args
    if reason := _why_not(q):
        return reason
    for x in (q, k, v, ring_k, ring_v, ring_raw):
        if x is not None and x.stride(3) != 1:
            return f"a last dim is strided: {x.stride()}"
    for weight in (q_weight, k_weight):
        if weight is not None and (weight.dtype != q.dtype or not weight.is_contiguous()):
            return f"a norm's weight is {weight.dtype} with strides {weight.stride()}, q is {q.dtype}"
    for table in (frame_table, key_frame_table, grid_table):
        if table is not None and not (table.dtype == torch.float32 and table.is_contiguous()):
            return f"a table is {table.dtype} with strides {table.stride()}"
    return None


def append(*args: Any, isa: str = "") -> Tensor:
    """Run the kernel on what :func:`why_not_append` was asked of, with at most the instruction set ``isa``.

    Returns:
        The rotated queries.
    """
    *inputs, slots, ring_k, ring_v, ring_raw, eps = args
    slots, out = slots.contiguous(), args[0].new_empty(args[0].shape)
    views = (None if x is None else _native.view(x) for x in (*inputs, slots, ring_k, ring_v, ring_raw))
    _native.module().ring_append_cpu(*views, eps, _native.view(out), torch.get_num_threads(), isa)
    return out


def why_not_norm(x: Tensor, *others: Tensor | None) -> str | None:
    """The first reason the kernel can't take `gated_modulate`'s or `rms_norm`'s tensors, or None if it can."""
    if reason := _why_not_tensor(x):
        return reason
    width = x.shape[-1]
    if width % _WIDTH_STEP or not 0 < width <= _MAX_WIDTH:
        return f"width {width} is no multiple of {_WIDTH_STEP} up to {_MAX_WIDTH}"
    for y in (x, *others):
        if y is not None and (y.dtype != x.dtype or y.stride(-1) != 1):
            return f"a tensor is {y.dtype} with strides {y.stride()}, x is {x.dtype}"
    return None


@overload
def gated_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float = 0.0,
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: None, scale: None, eps: float = 0.0, *, isa: str = ""
) -> tuple[Tensor, None]: ...
def gated_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float = 0.0,
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Compute ``s = x + gate * y`` and ``LayerNorm(s) * scale + shift`` in one pass.

    Args:
        x: ``(B, F * T_f, D)``; ``y`` likewise, None adds nothing.
        gate: ``(B or 1, F, 1, D)``; None adds ``y`` as it is.
        shift: ``(B or 1, F, 1, D)``, or ``(D,)`` for all frames.
        scale: like ``shift``; None leaves the norm out.
        eps: of the norm.
        isa: the best instruction set to use.

    Returns:
        ``s``, which is ``x`` where there is no ``y``, and its modulated norm or None.
    """
    summed = None if y is None else x.new_empty(x.shape)
    out = None if scale is None else x.new_empty(x.shape)
    rows = [None if v is None else v.view(1, 1, -1) if v.ndim == 1 else v.squeeze(2) for v in (gate, shift, scale)]
    views = [None if z is None else _native.view(z) for z in (x, y, *rows, summed, out)]
    _native.module().norm_cpu(*views, eps, True, torch.get_num_threads(), isa)
    return x if summed is None else summed, out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, isa: str = "") -> Tensor:
    """RMS-normalise ``x`` ``(B, T, D)`` over D and scale it by ``weight`` ``(D,)``."""
    out, view = x.new_empty(x.shape), _native.view
    _native.module().norm_cpu(
        view(x),
        None,
        None,
        None,
        view(weight.view(1, 1, -1)),
        None,
        view(out),
        eps,
        False,
        torch.get_num_threads(),
        isa,
    )
    return out


def _why_not(q: Tensor) -> str | None:
    if reason := _why_not_tensor(q):
        return reason
    d = q.shape[3]
    if d % _HEAD_DIM_STEP or not 0 < d <= _MAX_HEAD_DIM:
        return f"head dim {d} is no multiple of {_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}"
    return None


def _why_not_tensor(x: Tensor) -> str | None:
    return _native.why_no_cpu_kernels(x.dtype) or None if x.is_cpu else f"a tensor is on {x.device}"
