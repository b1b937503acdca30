"""Streaming attention over three tiers read in place: sink, memory and the ring of local frames."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from echo_ext import _attention, _cpu
from echo_ext._attention import Backend, Way
from echo_ext._autograd import recompute, wants_grad
from echo_ext._dispatch import register
from echo_ext.rope import axis_pairs, expand_shift, frame_table, rotate_pairs

KV = tuple[Tensor, Tensor]

_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define(
    "stream_attention(Tensor q, Tensor? shift, Tensor? sink_k, Tensor? sink_v, Tensor? memory_k, Tensor? memory_v, "
    'Tensor? ring_k, Tensor? ring_v, float scale, str backend="auto") -> (Tensor, Tensor)'
)


def stream_attention(
    q: Tensor,
    *,
    sink: KV | None = None,
    memory: KV | None = None,
    ring: KV | None = None,
    shift: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend to sink, memory and ring as if their keys were one sequence.

    ``softmax([R q Ks^T ; R q Km^T ; q Kr^T] * scale) [Vs ; Vm ; Vr]``. Ring keys are rotated by absolute frame
    ids, as ``q`` is; sink and memory keys live in the fixed frame of reference, so for them the query is turned by
    ``R``, the rotation from its absolute to its relative id (one angle a pair, shared by all tokens).

    Args:
        q: ``(B, Tq, H, d)`` queries rotated by their absolute ids, any strides with a contiguous last dim.
        sink: keys and values, each ``(B, Ts, H, d)``, any strides with a contiguous last dim; None leaves the tier out.
        memory: keys and values of the evolving memory, likewise.
        ring: keys and values of the filled slots, in any order of frames.
        shift: ``(B or 1, n_t, 2)`` float32 cos and sin of (relative - absolute id), see :func:`frame_shift`;
            None where the two agree.
        scale: score scale; default ``d ** -0.5``.
        backend: ``"kernel_sm90"`` and ``"kernel_sm80"`` name a CUDA kernel, ``"kernel"`` the better one,
            ``"kernel_cpu"`` that for x86 CPUs; they raise where it can't run. ``"library"``: the library's attention on
            each tier, joined by their log-sum-exps. ``"reference"``: the same in PyTorch's plainest form. ``"auto"``: a
            kernel (on the CPU where no gradient is wanted and the library isn't faster), or else the reference.

    Returns:
        ``(B, Tq, H, d)`` in ``q.dtype``. Softmax in float32. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or no tier holds a key.
        RuntimeError: a kernel was asked for by name and can't run; says why.

    Source: docs/method.md sections 2 and 3.
    """
    _check(q, shift, {"sink": sink, "memory": memory, "ring": ring})
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = [x for pair in (sink, memory, ring) for x in (pair or (None, None))]
    sink_k, sink_v, memory_k, memory_v, ring_k, ring_v = tensors
    args = (q, shift, sink_k, sink_v, memory_k, memory_v, ring_k, ring_v, scale)
    x = _inputs(*args)
    way = _attention.choose(backend, x)
    if wants_grad(q, *tensors):
        if way == "reference" or (way == "kernel_cpu" and backend == "auto"):
            return stream_attention_ref(*args)[0]
        return _StreamAttention.apply(*args, backend)  # of the library's LSEs there is no gradient
    if way in ("library", "reference"):
        return _merge_tiers(x, fastest=way == "library")[0]
    if way == "kernel_cpu" and not torch.compiler.is_compiling():
        return _cpu.attention(q, x.shift, sink, memory, ring, scale)[0]
    return torch.ops.echo_ext.stream_attention(*args, backend)[0]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: int, *, scale: float | None = None) -> Tensor:
    """Attend to keys whose last ``padding`` ones are the same, as are their values: a padded text.

    ``softmax(q K^T * scale) V``. On the CPU, where no gradient is wanted, one key stands for the padding and its weight
    counts ``padding`` times, which is the same sum.

    Args:
        q: ``(B, Tq, H, d)`` with a contiguous last dim.
        k: ``(B, T, H, d)``, any strides with a contiguous last dim; ``v`` likewise.
        padding: how many of the last tokens are equal; 0 and 1 say nothing.
        scale: score scale; default ``d ** -0.5``.

    Returns:
        ``(B, Tq, H, d)`` in ``q.dtype``. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or ``padding`` is not in ``0 .. T``.

    Source: docs/method.md section 5, text.
    """
    _check(q, None, {"text": (k, v)})
    if not 0 <= padding <= k.shape[1]:
        raise ValueError(f"padding must be in 0 .. {k.shape[1]}, the number of keys, got {padding}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    takes_kernel = _cpu.why_not_attention(q, None, scale) is None and not _cpu.library_is_faster(q)
    if wants_grad(q, k, v) or torch.compiler.is_compiling() or not takes_kernel:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    count = max(padding, 1)
    read = k.shape[1] - count + 1
    return _cpu.attention(q, None, None, None, (k[:, :read], v[:, :read]), scale, last_count=count)[0]


def frame_shift(
    relative_id: int | Tensor, absolute_id: int | Tensor, head_dim: int, device: torch.device | str | None = None
) -> Tensor:
    """Build the rotation that carries a query from its absolute to its relative frame id.

    Args:
        relative_id: id of any query frame inside the pretrained range; int or ``(B,)``.
        absolute_id: the same frame's own number in the stream; int or ``(B,)``.
        head_dim: ``d``.
        device: where the table goes; the angle is computed in float64 on the host.

    Returns:
        ``(B or 1, n_t, 2)`` float32 cos and sin.

    Source: docs/method.md section 3, last paragraph.
    """
    ids = torch.as_tensor(relative_id, dtype=torch.float64) - torch.as_tensor(absolute_id, dtype=torch.float64)
    return frame_table(ids.reshape(-1, 1), head_dim, device=device)[:, 0]


def shift_queries(q: Tensor, shift: Tensor) -> Tensor:
    """Turn the temporal pairs of ``q`` ``(B, T, H, d)`` by ``shift`` ``(B or 1, n_t, 2)``; rows and columns stay."""
    return rotate_pairs(q, *expand_shift(shift, q.shape[-1]))


def stream_attention_ref(
    q: Tensor,
    shift: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The oracle: all scores at once, softmax in float32 or wider, differentiable; output and LSE ``(B, H, Tq)``."""
    turned = q if shift is None else shift_queries(q, shift)
    tiers = [(turned, sink_k, sink_v), (turned, memory_k, memory_v), (q, ring_k, ring_v)]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = [torch.einsum("bihd,bjhd->bhij", x.to(wide), k.to(wide)) for x, k, _ in tiers if k is not None]
    joint = torch.cat(scores, dim=-1) * scale  # (B, H, Tq, Tk)
    weights = joint.softmax(dim=-1).split([x.shape[-1] for x in scores], dim=-1)
    values = [v for _, _, v in tiers if v is not None]
    reads = [torch.einsum("bhij,bjhd->bihd", w, v.to(wide)) for w, v in zip(weights, values, strict=True)]
    out = torch.stack(reads).sum(dim=0)
    return out.to(q.dtype), joint.logsumexp(dim=-1)


def _merge_tiers(x: _attention.Inputs, fastest: bool) -> tuple[Tensor, Tensor]:
    """The fallback: the library's attention on each tier in place, joined by their LSEs, returned (tiers, B, H, Tq)."""
    turned = x.q if x.shift is None else shift_queries(x.q, x.shift)
    queries = [turned] * x.turned + [x.q] * (len(x.runs) - x.turned)
    parts = [_tier(q, k, v, x.scale, fastest) for q, (_, k, v) in zip(queries, x.runs, strict=True)]
    lses = torch.stack([lse for _, lse in parts])
    if len(parts) == 1:
        return parts[0][0], lses
    weights = lses.softmax(dim=0).transpose(2, 3)[..., None]  # (tiers, B, Tq, H, 1)
    out = weights[0] * parts[0][0]
    for weight, (part, _) in zip(weights[1:], parts[1:], strict=True):
        out = torch.addcmul(out, weight, part.to(out.dtype))
    return out.to(x.q.dtype), lses


def _tier(q: Tensor, k: Tensor, v: Tensor, scale: float, fastest: bool) -> KV:
    """Attention over one tier as ``(B, Tq, H, d)`` and LSE ``(B, H, Tq)`` float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d): views, the library reads any strides
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        lse = lse[..., : q.shape[2]]  # padded to a multiple of 32
    elif fastest:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
        lse = lse.reshape(q.shape[:3])  # some versions keep a last dim of 1
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _check(q: Tensor, shift: Tensor | None, tiers: dict[str, KV | None]) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, d), got {tuple(q.shape)}")
    if q.stride(-1) != 1:
        raise ValueError(f"q must have a contiguous last dim, got strides {q.stride()}")
    b, _, h, d = q.shape
    keys = 0
    for name, pair in tiers.items():
        if pair is None:
            continue
        k, v = pair
        if k.ndim != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (b, h, d):
            raise ValueError(
                f"{name} keys and values must be ({b}, T, {h}, {d}) to match q, got {tuple(k.shape)}, {tuple(v.shape)}"
            )
        for x in pair:
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
            if x.stride(-1) != 1:
                raise ValueError(f"{name} must have a contiguous last dim, got strides {x.stride()}")
        keys += k.shape[1]
    if keys == 0:
        raise ValueError("no tier holds a key: pass at least the ring with the current block")
    if shift is not None and shift.shape not in ((1, axis_pairs(d)[0], 2), (b, axis_pairs(d)[0], 2)):
        raise ValueError(f"shift must be (1 or {b}, {axis_pairs(d)[0]}, 2) for d={d}, got {tuple(shift.shape)}")
    if shift is not None and shift.device != q.device:
        raise ValueError(f"shift is on {shift.device}, q is on {q.device}")


def _inputs(
    q: Tensor,
    shift: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    scale: float,
) -> _attention.Inputs:
    tiers = [("sink", sink_k, sink_v), ("memory", memory_k, memory_v), ("ring", ring_k, ring_v)]
    return _attention.inputs(q, shift, tiers, scale)


class _StreamAttention(torch.autograd.Function):
    """Op forward; backward recomputes through the reference, so gradients need no second kernel."""

    @staticmethod
    def forward(ctx, q, shift, *rest):
        *tensors, ctx.scale, backend = rest
        ctx.save_for_backward(q, shift, *tensors)
        return torch.ops.echo_ext.stream_attention(q, shift, *tensors, ctx.scale, backend)[0]

    @staticmethod
    def backward(ctx, grad):
        reference = functools.partial(stream_attention_ref, scale=ctx.scale)

        def again(*tensors: Any) -> Tensor:
            return reference(*tensors)[0]

        return *recompute(again, ctx.saved_tensors, ctx.needs_input_grad[:-2], grad), None, None


def _fake(q, shift, sink_k, sink_v, memory_k, memory_v, ring_k, ring_v, scale, backend="auto"):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _op(given: Sequence[Any], *kernels: Way) -> tuple[Tensor, Tensor]:
    """Run the kernel that :func:`_attention.choose` names where it is one of ``kernels``, or else the fallback."""
    backend: Backend = given[9] if len(given) > 9 else "auto"  # torch leaves out what is the default
    x = _inputs(*given[:9])
    way = _attention.choose(backend, x)
    if way in kernels:
        reason = _attention.why_not_address(way, x)
        if reason is None:
            return _attention.run(way, x)
        if backend != "auto":
            raise RuntimeError(f"stream_attention: {way} can't run: {reason}")
    out, lses = _merge_tiers(x, fastest=way == "library")
    return out.contiguous(), lses.float().logsumexp(dim=0)


register(
    _LIB,
    "stream_attention",
    kernel=lambda *given: _op(given, "kernel_sm90", "kernel_sm80"),
    cpu=lambda *given: _op(given, "kernel_cpu"),
    fake=_fake,
)
