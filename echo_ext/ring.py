"""The K/V ring: append normalises, rotates and writes in place; evict names what the next append overwrites."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from echo_ext import _cpu, _native
from echo_ext._autograd import wants_grad
from echo_ext._dispatch import MAX_ROW_BYTES, Backend, register, why_not_kernel, why_not_vectors, without_cuda_kernel
from echo_ext.rope import check_tables, expand_tables, rotate_pairs, why_not_table

_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define(
    "ring_append(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor frame_table, "
    "Tensor? key_frame_table, Tensor grid_table, Tensor slots, Tensor(a!) ring_k, Tensor(b!) ring_v, "
    "Tensor(c!)? ring_raw, float eps) -> Tensor"
)


class Evicted(NamedTuple):
    """Frames about to leave a ring: ``frames`` slots from ``first`` on, wrapping at ``slots``."""

    first: int
    frames: int
    slots: int

    def spans(self) -> list[tuple[int, int]]:
        """The one or two runs of neighbouring slots, oldest frame first, as ``(start, stop)``."""
        end = self.first + self.frames
        if self.frames == 0:
            return []
        if end <= self.slots:
            return [(self.first, end)]
        return [(self.first, self.slots), (0, end - self.slots)]


def ring_evict(
    ring_k: Tensor, ring_v: Tensor, first: int, count: int, tokens_per_frame: int
) -> list[tuple[Tensor, Tensor]]:
    """Return views of ``count`` frames from slot ``first`` on, oldest first; nothing is copied.

    Args:
        ring_k: ``(B, L * T_f, H, d)`` keys of ``L`` frame slots.
        ring_v: ``(B, L * T_f, H, d)`` values.
        first: slot of the oldest frame to leave.
        count: frames that leave, at most ``L``; 0 gives an empty list.
        tokens_per_frame: ``T_f``.

    Returns:
        One ``(k, v)`` pair of views, or two where the frames wrap past the last slot.

    Raises:
        ValueError: slots and frames don't fit the ring.

    Source: docs/method.md section 4, eviction.
    """
    if ring_k.shape != ring_v.shape or ring_k.ndim != 4:
        raise ValueError(f"ring_k {tuple(ring_k.shape)} and ring_v {tuple(ring_v.shape)} must be one (B, T, H, d)")
    if tokens_per_frame < 1 or ring_k.shape[1] % tokens_per_frame:
        raise ValueError(f"a ring of {ring_k.shape[1]} tokens is no whole number of {tokens_per_frame}-token frames")
    slots = ring_k.shape[1] // tokens_per_frame
    if not 0 <= count <= slots or not 0 <= first < max(slots, 1):
        raise ValueError(f"can't evict {count} frames from slot {first} of a ring of {slots} slots")
    spans = Evicted(first, count, slots).spans()
    t = tokens_per_frame
    return [(ring_k[:, a * t : b * t], ring_v[:, a * t : b * t]) for a, b in spans]


def ring_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frame_table: Tensor,
    grid_table: Tensor,
    slots: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_raw: Tensor | None = None,
    key_frame_table: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """Normalise and rotate ``q`` and ``k``, write ``k`` and ``v`` into their ring slots, return ``q``.

    ``q' = rope(rms_norm(q))``, ``ring_k[slots] = rope(rms_norm(k))``, ``ring_v[slots] = v``; the norm runs over
    all heads together (width ``D = H * d``). The slots are overwritten in place: nothing shifts, nothing is copied.

    Args:
        q: ``(B, F * T_f, H, d)`` projected queries, any strides.
        k: ``(B, F * T_f, H, d)`` projected keys.
        v: ``(B, F * T_f, H, d)`` values.
        q_weight: ``(D,)`` scale of the query norm; None leaves ``q`` unnormalised.
        k_weight: ``(D,)`` scale of the key norm; None leaves ``k`` unnormalised.
        frame_table: ``(B or 1, F, n_t, 2)`` float32 angles of the frames' own ids.
        grid_table: ``(T_f, n_s, 2)`` float32 angles of rows and columns.
        slots: ``(B or 1, F)`` int64, the slot of each frame; each row's slots differ. They are read on the device
            alone: the kernel leaves out a frame whose slot is not in the ring, where PyTorch raises.
        ring_k: ``(B, S * T_f, H, d)`` rotated keys, written in place.
        ring_v: ``(B, S * T_f, H, d)`` values, written in place.
        ring_raw: like ``ring_k``, keys before rotation; only the layer whose evicted keys feed the memory needs it.
        key_frame_table: angles for the keys where they differ from the queries' (re-cached sink slots).
        eps: of the norms.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back to the CPU kernel and to
            PyTorch; ``"reference"`` is PyTorch.

    Returns:
        ``(B, F * T_f, H, d)`` rotated queries in ``q.dtype``; norm and rotation in float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: a gradient is wanted (the ring is for streaming; training uses the functional twin), or
            ``backend="kernel"`` and the kernel can't run.

    Source: docs/method.md sections 2 and 3.
    """
    _check(q, k, v, q_weight, k_weight, frame_table, key_frame_table, grid_table, slots, ring_k, ring_v, ring_raw)
    if wants_grad(q, k, v):
        raise RuntimeError("ring_append writes in place and has no gradient; train with the functional cache")
    args = (
        q,
        k,
        v,
        q_weight,
        k_weight,
        frame_table,
        key_frame_table,
        grid_table,
        slots,
        ring_k,
        ring_v,
        ring_raw,
        eps,
    )
    if without_cuda_kernel("ring_append", backend, _why_not_kernel(args)):
        if backend == "auto" and _cpu.why_not_append(*args) is None:
            return torch.ops.echo_ext.ring_append(*args) if torch.compiler.is_compiling() else _cpu.append(*args)
        return ring_append_ref(*args)
    return torch.ops.echo_ext.ring_append(*args)


def ring_append_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frame_table: Tensor,
    key_frame_table: Tensor | None,
    grid_table: Tensor,
    slots: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_raw: Tensor | None,
    eps: float,
) -> Tensor:
    """The fallback, and in float64 the oracle."""
    tables = expand_tables(frame_table, grid_table)
    key_tables = tables if key_frame_table is None else expand_tables(key_frame_table, grid_table)
    k = width_norm(k, k_weight, eps)
    _write(ring_k, rotate_pairs(k, *key_tables), slots)
    _write(ring_v, v, slots)
    if ring_raw is not None:
        _write(ring_raw, k, slots)
    return rotate_pairs(width_norm(q, q_weight, eps), *tables)


def width_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS-normalise ``x`` ``(B, T, H, d)`` over all heads together, in float32; None passes ``x`` through."""
    if weight is None:
        return x
    wide = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
    return nnf.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype).view(x.shape)


def _write(ring: Tensor, x: Tensor, slots: Tensor) -> None:
    frame = (x.shape[1] // slots.shape[1], *x.shape[2:])
    ring, x = (y.view(y.shape[0], -1, *frame) for y in (ring, x))  # (B, S, T_f, H, d)
    if slots.shape[0] == 1:
        ring.index_copy_(1, slots[0], x)
        return
    for row, new, into in zip(ring, x, slots, strict=True):
        row.index_copy_(0, into, new)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frame_table: Tensor,
    key_frame_table: Tensor | None,
    grid_table: Tensor,
    slots: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_raw: Tensor | None,
) -> None:
    if q.ndim != 4 or ring_k.ndim != 4:
        raise ValueError(f"q and ring_k must be (B, T, H, d), got {tuple(q.shape)} and {tuple(ring_k.shape)}")
    (b, t, h, d), tokens_per_frame = q.shape, grid_table.shape[0]
    for table in (frame_table, key_frame_table):
        if table is not None:
            check_tables(b, t, d, table, grid_table)
    if ring_k.shape[1] % tokens_per_frame:
        raise ValueError(f"a ring of {ring_k.shape[1]} tokens is no whole number of {tokens_per_frame}-token frames")
    ring_shape = (b, ring_k.shape[1], h, d)
    shapes = {"k": (k, q.shape), "v": (v, q.shape), "ring_k": (ring_k, ring_shape), "ring_v": (ring_v, ring_shape)}
    if ring_raw is not None:
        shapes["ring_raw"] = (ring_raw, ring_shape)
    for name, (x, shape) in shapes.items():
        if x.shape != torch.Size(shape):
            raise ValueError(f"{name} must be {tuple(shape)} to match q {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (h * d,):
            raise ValueError(f"{name} must be ({h * d},) for {h} heads of {d}, got {tuple(weight.shape)}")
    others = {"q_weight": q_weight, "k_weight": k_weight, "frame_table": frame_table, "grid_table": grid_table}
    for name, other in (others | {"key_frame_table": key_frame_table, "slots": slots}).items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}, q is on {q.device}")
    if slots.dtype != torch.int64 or slots.shape not in ((1, frame_table.shape[1]), (b, frame_table.shape[1])):
        raise ValueError(
            f"slots must be int64 (1 or {b}, {frame_table.shape[1]}), got {slots.dtype} {tuple(slots.shape)}"
        )


def _why_not_kernel(args: tuple[Any, ...]) -> str | None:
    """The first reason the CUDA kernel can't take the op's ``args``, or None if it can."""
    q, k, v, q_weight, k_weight, frame_table, key_frame_table, grid_table, _, ring_k, ring_v, ring_raw, _ = args
    if reason := why_not_kernel("ring_append", q, "q"):
        return reason
    if q.shape[3] % (16 // q.element_size()):
        return f"head dim {q.shape[3]} is no multiple of {16 // q.element_size()}"
    if q.shape[2] * q.shape[3] * q.element_size() > MAX_ROW_BYTES:
        return f"{q.shape[2]} heads of {q.shape[3]} {q.dtype} are wider than {MAX_ROW_BYTES} bytes"
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    for name, weight in weights.items():
        if weight is not None and weight.dtype != q.dtype:
            return f"{name} is {weight.dtype}, q is {q.dtype}"
    tables = {"frame_table": frame_table, "key_frame_table": key_frame_table, "grid_table": grid_table}
    for name, table in tables.items():
        if table is not None and (reason := why_not_table(table, name)):
            return reason
    tensors = {"q": q, "k": k, "v": v, "ring_k": ring_k, "ring_v": ring_v, "ring_raw": ring_raw}
    return why_not_vectors(tensors | weights)


def _kernel(*args: Any) -> Tensor:
    q, (*tensors, eps) = args[0], args
    out = q.new_empty(q.shape)
    views = (None if x is None else _native.view(x) for x in tensors)
    _native.module().ring_append_fwd(*views, eps, _native.view(out), _native.stream_of(q))
    return out


def _on_cpu(*args: Any) -> Tensor:
    return ring_append_ref(*args) if _cpu.why_not_append(*args) else _cpu.append(*args)


register(
    _LIB,
    "ring_append",
    kernel=_kernel,
    cpu=_on_cpu,
    fake=lambda q, *rest: q.new_empty(q.shape),
)
