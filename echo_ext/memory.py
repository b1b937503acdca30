"""The evolving memory's write: memory queries read evicted frames, a gate blends old and new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from echo_ext import _attention, _cpu, _native
from echo_ext._autograd import recompute, wants_grad
from echo_ext._dispatch import MAX_ROW_BYTES, Backend, register, why_not_kernel, why_not_vectors, without_cuda_kernel
from echo_ext.attention import stream_attention
from echo_ext.gate import gate_blend
from echo_ext.linear import linear
from echo_ext.rope import check_tables, rope_rotate, rope_rotate_ref, why_not_table

Segment = tuple[Tensor, Tensor]
RopeTables = tuple[Tensor, Tensor]

_MAX_SEGMENTS = 3  # the sink, and evicted frames that wrap around the end of their ring
_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define(
    "memory_xattn(Tensor q, Tensor[] keys, Tensor[] values, Tensor? norm_weight, float eps, float scale,"
    " Tensor? q_frames, Tensor? q_grid) -> Tensor"
)


class WriteLayer(NamedTuple):
    """Weights of one cross-attention layer of a memory write; linears are ``(out, in)``."""

    norm1: Tensor  # (D,)
    q_weight: Tensor  # (D, D)
    q_bias: Tensor  # (D,)
    norm_q: Tensor  # (D,)
    o_weight: Tensor  # (D, D)
    o_bias: Tensor  # (D,)
    norm2: Tensor  # (D,)
    up_weight: Tensor  # (hidden, D)
    up_bias: Tensor  # (hidden,)
    down_weight: Tensor  # (D, hidden)
    down_bias: Tensor  # (D,)


class WriteGate(NamedTuple):
    """Weights of the connector and the gate of one group; linears are ``(out, in)``."""

    in_weight: Tensor  # (D, D)
    in_bias: Tensor  # (D,)
    out_weight: Tensor  # (D, D)
    out_bias: Tensor  # (D,)
    norm: Tensor  # (D,)
    gate_weight: Tensor  # (D, 2D)
    gate_bias: Tensor  # (D,)


def memory_xattn(
    q: Tensor,
    segments: Sequence[Segment],
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    q_rope: RopeTables | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Read the keys and values of all ``segments`` with the memory queries ``q``.

    ``softmax(scale * rotate(RMSNorm(q)) [k_1 ; k_2 ; ..]^T) [v_1 ; v_2 ; ..]``, the softmax over all segments jointly
    and no segment copied next to another: each may be a strided view of the ring.

    Args:
        q: ``(B, Tq, H, d)`` projected memory queries; any floating dtype.
        segments: 1 to 3 pairs of keys and values, each ``(B, Tk, H, d)`` in the dtype of ``q``, ``Tk >= 1``: the sink
            (where writes are anchored to it) and the evicted frames, in two parts where they wrap around in the ring.
        norm_weight: ``(D,)`` with ``D = H * d``: normalise ``q`` over D, all heads together, before anything else.
        eps: added to the mean square in that norm.
        q_rope: frame table ``(B or 1, F, n_t, 2)`` and grid table ``(T_f, n_s, 2)`` that rotate the normed queries,
            ``Tq = F * T_f``. Keys are taken as they are: rotate them once with `rope_rotate`, not once a layer.
        scale: score scale; default ``d ** -0.5``.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back.

    Returns:
        ``(B, Tq, H, d)`` in ``q.dtype``. Norm and softmax are in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a segment is empty, or there are none or more than 3.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md, the memory write.
    """
    q_frames, q_grid = q_rope or (None, None)
    _check(q, segments, norm_weight, q_frames, q_grid)
    keys, values = [k for k, _ in segments], [v for _, v in segments]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (q, keys, values, norm_weight, eps, scale, q_frames, q_grid)
    if without_cuda_kernel("memory_xattn", backend, _why_not_kernel(*args)):
        return _read_in_place(*args, backend)
    if wants_grad(q, norm_weight, *keys, *values):
        return _MemoryXAttn.apply(len(keys), eps, scale, q_frames, q_grid, q, norm_weight, *keys, *values)
    return torch.ops.echo_ext.memory_xattn(*args)


def memory_xattn_ref(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    scale: float,
    q_frames: Tensor | None,
    q_grid: Tensor | None,
) -> Tensor:
    """The oracle: all scores at once, softmax in float32 or wider, differentiable, any device."""
    q = _norm_and_rotate(q, norm_weight, eps, q_frames, q_grid)
    wide = _wide(q)
    scores = [torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) for k in keys]  # (B, H, Tq, Tk)
    shares = (torch.cat(scores, dim=-1) * scale).softmax(dim=-1).split([k.shape[1] for k in keys], dim=-1)
    parts = [torch.einsum("bhij,bjhd->bihd", x, v.to(wide)) for x, v in zip(shares, values, strict=True)]
    return sum(parts[1:], parts[0]).to(q.dtype)


def _read_in_place(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    scale: float,
    q_frames: Tensor | None,
    q_grid: Tensor | None,
    backend: Backend = "reference",
) -> Tensor:
    """The fallback: attention on each segment where it lies, several joined as tiers of a stream are."""
    q = _norm_and_rotate(q, norm_weight, eps, q_frames, q_grid)
    if len(keys) == 1 and not _suits_stream(scale, q, keys[0], values[0]):
        q, k, v = (x.transpose(1, 2) for x in (q, keys[0], values[0]))  # (B, H, T, d): views
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    sink, memory, ring = [*zip(keys, values, strict=True), None, None][:_MAX_SEGMENTS]
    return stream_attention(q, sink=sink, memory=memory, ring=ring, scale=scale, backend=backend)


def _suits_stream(scale: float, q: Tensor, *kv: Tensor) -> bool:
    """Whether a lone segment gains by the stream's attention: by its kernel for CPUs, which has no gradient."""
    dense = all(x.stride(-1) == 1 for x in (q, *kv))
    return dense and not wants_grad(q, *kv) and _cpu.why_not_attention(q, None, scale) is None


def _norm_and_rotate(
    q: Tensor, norm_weight: Tensor | None, eps: float, q_frames: Tensor | None, q_grid: Tensor | None
) -> Tensor:
    if norm_weight is not None:
        q = _rms_norm(q, norm_weight.unflatten(0, q.shape[2:]), eps)
    return q if q_frames is None or q_grid is None else rope_rotate_ref(q, q_frames, q_grid)


def memory_write(
    state: Tensor,
    segments: Sequence[Segment],
    layers: Sequence[WriteLayer],
    gates: Sequence[WriteGate] | None,
    *,
    heads: int,
    post_norm: Tensor | None = None,
    eps: float = 1e-6,
    q_rope: RopeTables | None = None,
    k_rope: Sequence[RopeTables] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Fold evicted frames into the memory ``state``; `memory_xattn` and `gate_blend` with the linears between them.

    Each layer: ``S += W_o xattn(W_q RMSNorm(S)); S += W_2 gelu(W_1 RMSNorm(S))``. Then ``P = RMSNorm(W_b gelu(W_a S))``
    and the gate blends it with the state from before the write. Groups share the layers: their states are read as
    more queries over the same keys, so keys are never repeated.

    Args:
        state: ``(G, B, T, D)``, ``G`` groups of memory tokens; the weights' dtype, or a wider one.
        segments: 1 to 3 pairs of keys and values ``(B, Tk, H, d)``; see `memory_xattn`.
        layers: weights of the cross-attention layers, shared by the groups.
        gates: connector and gate of each group; None publishes the layers' output (the residual update).
        heads: ``H``, with ``D = H * d``.
        post_norm: ``(D,)`` weight of an RMSNorm over the new state.
        eps: of every RMSNorm.
        q_rope: tables that rotate the queries: frame ``(B or 1, F, n_t, 2)``, grid ``(T_f, n_s, 2)``, ``T = F * T_f``.
        k_rope: the same for each segment's keys.
        backend: passed on to the ops.

    Returns:
        ``(G, B, T, D)`` in ``state.dtype``; ``state`` itself is left alone.

    Raises:
        ValueError: shapes, dtypes or counts disagree.
        RuntimeError: ``backend="kernel"`` and a kernel can't run; says why.

    Source: docs/method.md, the memory write.
    """
    _check_write(state, segments, gates, heads, k_rope)
    groups, batch, tokens, width = state.shape
    dtype = segments[0][0].dtype
    if k_rope is not None:
        pairs = zip(segments, k_rope, strict=True)
        segments = [(rope_rotate(k, *tables, backend=backend), v) for (k, v), tables in pairs]
    if q_rope is not None and groups > 1:
        q_rope = q_rope[0].repeat(1, groups, 1, 1), q_rope[1]
    x = state.transpose(0, 1).reshape(batch, groups * tokens, width)  # a view for one group
    for layer in layers:
        q = linear(_norm(x, layer.norm1, eps), layer.q_weight, layer.q_bias)
        q = q.unflatten(-1, (heads, width // heads)).to(dtype)
        read = memory_xattn(q, segments, norm_weight=layer.norm_q, eps=eps, q_rope=q_rope, backend=backend)
        x = x + linear(read.flatten(2).to(layer.o_weight.dtype), layer.o_weight, layer.o_bias)
        hidden = linear(_norm(x, layer.norm2, eps), layer.up_weight, layer.up_bias, gelu=True)
        x = x + linear(hidden, layer.down_weight, layer.down_bias)
    x = x.unflatten(1, (groups, tokens)).transpose(0, 1)  # (G, B, T, D)
    if gates is not None:
        written = []
        for old, new, gate in zip(state, x, gates, strict=True):
            hidden = linear(new.to(gate.in_weight.dtype), gate.in_weight, gate.in_bias, gelu=True)
            proposal = linear(hidden, gate.out_weight, gate.out_bias)
            proposal = _norm(proposal, gate.norm, eps).to(state.dtype)
            written.append(gate_blend(old, proposal, gate.gate_weight, gate.gate_bias, backend=backend))
        x = torch.stack(written) if groups > 1 else written[0].unsqueeze(0)
    return x if post_norm is None else _rms_norm(x, post_norm, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over as many last dims as ``weight`` has, in at least float32; the dtype of ``x``."""
    wide = _wide(x)
    return torch.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, ready for a linear layer in the weights' dtype where the state is wider."""
    return _rms_norm(x, weight, eps).to(weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    q: Tensor,
    segments: Sequence[Segment],
    norm_weight: Tensor | None,
    q_frames: Tensor | None,
    q_grid: Tensor | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, Tq, H, d), got {tuple(q.shape)}")
    if not 1 <= len(segments) <= _MAX_SEGMENTS:
        raise ValueError(f"segments must be 1 to {_MAX_SEGMENTS} pairs of keys and values, got {len(segments)}")
    b, tq, h, d = q.shape
    for i, (k, v) in enumerate(segments):
        if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (b, h, d):
            raise ValueError(f"keys of segment {i} must be ({b}, Tk, {h}, {d}) to match q, got {tuple(k.shape)}")
        if k.shape[1] == 0:
            raise ValueError(f"segment {i} is empty, keys {tuple(k.shape)}: leave it out")
        if v.shape != k.shape:
            raise ValueError(f"values of segment {i} are {tuple(v.shape)}, its keys {tuple(k.shape)}")
        for name, x in (("keys", k), ("values", v)):
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(f"{name} of segment {i} are {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
    if norm_weight is not None and norm_weight.shape != (h * d,):
        raise ValueError(f"norm_weight must be ({h * d},) for {h} heads of {d}, got {tuple(norm_weight.shape)}")
    if q_frames is not None and q_grid is not None:
        check_tables(b, tq, d, q_frames, q_grid)
    others = {"norm_weight": norm_weight, "frame table of q_rope": q_frames, "grid table of q_rope": q_grid}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}, q is on {q.device}")


def _check_write(
    state: Tensor,
    segments: Sequence[Segment],
    gates: Sequence[WriteGate] | None,
    heads: int,
    k_rope: Sequence[RopeTables] | None,
) -> None:
    if state.ndim != 4:
        raise ValueError(f"state must be (G, B, T, D), got {tuple(state.shape)}")
    if state.shape[-1] % heads:
        raise ValueError(f"state width {state.shape[-1]} is no multiple of {heads} heads")
    if not segments:
        raise ValueError("segments is empty: a memory write needs at least one pair of keys and values")
    if gates is not None and len(gates) != state.shape[0]:
        raise ValueError(f"state has {state.shape[0]} groups, gates has {len(gates)}: pass one for each group")
    if k_rope is not None and len(k_rope) != len(segments):
        raise ValueError(f"k_rope has {len(k_rope)} pairs of tables for {len(segments)} segments: pass one for each")


def _why_not_kernel(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    scale: float,
    q_frames: Tensor | None,
    q_grid: Tensor | None,
) -> str | None:
    """The first reason the CUDA kernels can't take these arguments, or None if they can."""
    if reason := why_not_kernel("memory_query", q, "q"):
        return reason
    for name, table in (("frame table of q_rope", q_frames), ("grid table of q_rope", q_grid)):
        if table is not None and (reason := why_not_table(table, name)):
            return reason
    if norm_weight is not None and norm_weight.dtype != q.dtype:
        return f"norm_weight is {norm_weight.dtype}, q is {q.dtype}"
    if q.shape[2] * q.shape[3] * q.element_size() > MAX_ROW_BYTES:
        return f"{q.shape[2]} heads of {q.shape[3]} {q.dtype} are wider than {MAX_ROW_BYTES} bytes"
    tensors = {"q": q, "norm_weight": norm_weight}
    for i, pair in enumerate(zip(keys, values, strict=True)):
        tensors |= dict(zip((f"keys of segment {i}", f"values of segment {i}"), pair, strict=True))
    return why_not_vectors(tensors) or _attention.why_not_kernel_sm80(_attention_inputs(q, keys, values, scale))


def _attention_inputs(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> _attention.Inputs:
    runs = [(f"segment {i}", k, v) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    return _attention.Inputs(q, None, runs, 0, scale)


def _kernel(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    scale: float,
    q_frames: Tensor | None,
    q_grid: Tensor | None,
) -> Tensor:
    """Norm and rotation of the queries by a kernel of their own: the norm is over all heads, attention is by head."""
    if norm_weight is not None or q_frames is not None:
        turned = q.new_empty(q.shape)
        views = (None if x is None else _native.view(x) for x in (q, norm_weight, q_frames, q_grid))
        _native.module().memory_query_fwd(*views, eps, _native.view(turned), _native.stream_of(q))
        q = turned
    inputs = _attention_inputs(q, keys, values, scale)
    return _attention.run(_attention.choose("kernel", inputs), inputs)[0]


class _MemoryXAttn(torch.autograd.Function):
    """Op forward; backward recomputes through the reference, so gradients need no second kernel."""

    @staticmethod
    def forward(ctx, count, eps, scale, q_frames, q_grid, q, norm_weight, *cache):
        ctx.save_for_backward(q_frames, q_grid, q, norm_weight, *cache)
        ctx.static = count, eps, scale
        keys, values = list(cache[:count]), list(cache[count:])
        return torch.ops.echo_ext.memory_xattn(q, keys, values, norm_weight, eps, scale, q_frames, q_grid)

    @staticmethod
    def backward(ctx, grad_out):
        count, eps, scale = ctx.static
        q_frames, q_grid, *inputs = ctx.saved_tensors

        def again(q, norm_weight, *cache):
            return memory_xattn_ref(q, cache[:count], cache[count:], norm_weight, eps, scale, q_frames, q_grid)

        return *(None,) * 5, *recompute(again, inputs, ctx.needs_input_grad[5:], grad_out)


register(
    _LIB,
    "memory_xattn",
    kernel=_kernel,
    cpu=lambda *args: _read_in_place(*args).contiguous(),
    fake=lambda q, *rest: q.new_empty(q.shape),
)
