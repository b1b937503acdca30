"""The evolving memory's write: memory queries read evicted frames, a gate blends old and new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from echo_ext._dispatch import Backend, use_reference, why_not_kernel
from echo_ext.attention import stream_attention
from echo_ext.linear import linear
from echo_ext.rope import check_tables, rope_rotate, rope_rotate_ref

Segment = tuple[Tensor, Tensor]
RopeTables = tuple[Tensor, Tensor]

_MAX_SEGMENTS = 3  # the sink, and evicted frames that wrap around the end of their ring
_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define(
    "memory_xattn(Tensor q, Tensor[] keys, Tensor[] values, Tensor? norm_weight, float eps, float scale,"
    " Tensor? q_frames, Tensor? q_grid) -> Tensor"
)
_LIB.define("gate_blend(Tensor state, Tensor proposal, Tensor weight, Tensor bias) -> Tensor")


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
    _check_xattn(q, segments, norm_weight, q_frames, q_grid)
    keys, values = [k for k, _ in segments], [v for _, v in segments]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (q, keys, values, norm_weight, eps, scale, q_frames, q_grid)
    if use_reference("memory_xattn", backend, _why_not_kernel("memory_xattn", q)):
        return _read_in_place(*args)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, norm_weight, *keys, *values)):
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
) -> Tensor:
    """The fallback: the library's attention on each segment where it lies, several joined as tiers of a stream are."""
    q = _norm_and_rotate(q, norm_weight, eps, q_frames, q_grid)
    if len(keys) == 1:
        if not torch.is_grad_enabled():
            return stream_attention(q, ring=(keys[0], values[0]), scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (q, keys[0], values[0]))  # (B, H, T, d): views
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    sink, memory, ring = [*zip(keys, values, strict=True), None][:_MAX_SEGMENTS]
    return stream_attention(q, sink=sink, memory=memory, ring=ring, scale=scale, backend="reference")


def _norm_and_rotate(
    q: Tensor, norm_weight: Tensor | None, eps: float, q_frames: Tensor | None, q_grid: Tensor | None
) -> Tensor:
    if norm_weight is not None:
        q = _rms_norm(q, norm_weight.unflatten(0, q.shape[2:]), eps)
    return q if q_frames is None or q_grid is None else rope_rotate_ref(q, q_frames, q_grid)


def gate_blend(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Keep the gated share of ``state`` and take the rest from ``proposal``.

    ``g * state + (1 - g) * proposal`` with ``g = sigmoid([state ; proposal] W^T + b)``, element by element.

    Args:
        state: ``(B, T, D)`` memory before this write; any floating dtype.
        proposal: ``(B, T, D)`` what the write proposes, in the dtype of ``state``.
        weight: ``(D, 2D)``, the columns for ``state`` first.
        bias: ``(D,)`` in the dtype of ``weight``, which may be narrower than the state's: products are in that dtype.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back.

    Returns:
        ``(B, T, D)`` in ``state.dtype``. Sigmoid and blend are in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md, the memory write.
    """
    _check_gate(state, proposal, weight, bias)
    args = (state, proposal, weight, bias)
    if use_reference("gate_blend", backend, _why_not_kernel("gate_blend", state)):
        return gate_blend_ref(*args)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args):
        return _GateBlend.apply(*args)
    return torch.ops.echo_ext.gate_blend(*args)


def gate_blend_ref(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The fallback, and in float64 the oracle: differentiable, any device; never builds ``[state ; proposal]``."""
    wide, width = _wide(state), state.shape[-1]
    logits = F.linear(state.to(weight.dtype), weight[:, :width], bias).to(wide)
    logits = logits + F.linear(proposal.to(weight.dtype), weight[:, width:])
    return torch.lerp(proposal.to(wide), state.to(wide), logits.sigmoid()).to(state.dtype)


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


def _check_xattn(
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


def _check_gate(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> None:
    if state.ndim != 3:
        raise ValueError(f"state must be (B, T, D), got {tuple(state.shape)}")
    width = state.shape[-1]
    expected = {"proposal": (proposal, state.shape), "weight": (weight, (width, 2 * width)), "bias": (bias, (width,))}
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} to match state {tuple(state.shape)}, got {tuple(x.shape)}")
        if x.device != state.device:
            raise ValueError(f"{name} is on {x.device}, state on {state.device}")
    if proposal.dtype != state.dtype:
        raise ValueError(f"proposal is {proposal.dtype}, state is {state.dtype}: cast the proposal")
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}, weight is {weight.dtype}")


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


def _why_not_kernel(op: str, x: Tensor) -> str | None:
    """The first reason the CUDA kernel of ``op`` can't take ``x``, or None if it can."""
    return why_not_kernel(op, x, "q" if op == "memory_xattn" else "state")


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

        return *(None,) * 5, *_recompute(again, inputs, ctx.needs_input_grad[5:], grad_out)


class _GateBlend(torch.autograd.Function):
    """Op forward; backward recomputes through the reference, so gradients need no second kernel."""

    @staticmethod
    def forward(ctx, state, proposal, weight, bias):
        ctx.save_for_backward(state, proposal, weight, bias)
        return torch.ops.echo_ext.gate_blend(state, proposal, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        return tuple(_recompute(gate_blend_ref, ctx.saved_tensors, ctx.needs_input_grad, grad_out))


def _recompute(
    function: Callable[..., Tensor], saved: Sequence[Tensor | None], needs: Sequence[bool], grad_out: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*saved)`` for the inputs that need one, None for the others."""
    inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(saved, needs, strict=True)]
    with torch.enable_grad():
        out = function(*inputs)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if x is not None and need]
    grads = iter(torch.autograd.grad(out, wanted, grad_out))
    return [next(grads) if need else None for need in needs]


_LIB.impl("memory_xattn", lambda *args: _read_in_place(*args).contiguous(), "CPU")
_LIB.impl("memory_xattn", lambda *args: _read_in_place(*args).contiguous(), "CUDA")
_LIB.impl("gate_blend", gate_blend_ref, "CPU")
_LIB.impl("gate_blend", gate_blend_ref, "CUDA")
torch.library.register_fake("echo_ext::memory_xattn", lambda q, *rest: q.new_empty(q.shape), lib=_LIB)
torch.library.register_fake("echo_ext::gate_blend", lambda state, *rest: state.new_empty(state.shape), lib=_LIB)
