"""LayerNorm with a frame's scale and shift, and the gated residual before it, in one read and one write of a token."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from echo_ext import _cpu, _native
from echo_ext._autograd import recompute, wants_grad
from echo_ext._dispatch import MAX_ROW_BYTES, Backend, register, why_not_kernel, why_not_vectors, without_cuda_kernel

_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define("modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
_LIB.define("gated_add(Tensor x, Tensor y, Tensor gate) -> Tensor")
_LIB.define(
    "gated_modulate(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)"
)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: Backend = "auto") -> Tensor:
    """Normalise each token and scale and shift it by its frame's vectors.

    ``LayerNorm(x) * scale + shift``, the norm without weights of its own.

    Args:
        x: ``(B, F * T_f, D)`` tokens, frame by frame; float32, float16, bfloat16 or float64.
        shift: ``(B or 1, F, 1, D)``.
        scale: ``(B or 1, F, 1, D)``, already 1 + the predicted scale.
        eps: of the norm.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back to the CPU kernel, where no
            gradient is wanted, and to PyTorch; ``"reference"`` is PyTorch.

    Returns:
        ``(B, F * T_f, D)`` in ``x.dtype``, contiguous. The kernels norm in float32.

    Raises:
        ValueError: shapes or devices disagree.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md section 5, conditioning.
    """
    _check(x, None, None, shift, scale)
    if without_cuda_kernel("modulate", backend, _why_not_kernel("modulate", x, None, None, shift, scale)):
        if _takes_cpu(backend, x, shift, scale):
            return _cpu.gated_modulate(x, None, None, shift, scale, eps)[1]
        return modulate_ref(x, shift, scale, eps)
    if wants_grad(x, shift, scale):
        return _Modulate.apply(x, shift, scale, eps)
    return torch.ops.echo_ext.modulate(x, shift, scale, eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Add the gated ``y`` to ``x``: ``x + gate * y`` with one gate vector a frame.

    Args:
        x: ``(B, F * T_f, D)`` tokens, frame by frame.
        y: ``(B, F * T_f, D)`` what a layer adds to them.
        gate: ``(B or 1, F, 1, D)``.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back to the CPU kernel, where no
            gradient is wanted, and to PyTorch; ``"reference"`` is PyTorch.

    Returns:
        ``(B, F * T_f, D)`` in ``x.dtype``, contiguous.

    Raises:
        ValueError: shapes or devices disagree.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md section 5, conditioning.
    """
    _check(x, y, gate)
    if without_cuda_kernel("gated_add", backend, _why_not_kernel("gated_add", x, y, gate)):
        if _takes_cpu(backend, x, y, gate):
            return _cpu.gated_modulate(x, y, gate, None, None)[0]
        return gated_add_ref(x, y, gate)
    if wants_grad(x, y, gate):
        return _GatedAdd.apply(x, y, gate)
    return torch.ops.echo_ext.gated_add(x, y, gate)


def gated_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the gated ``y`` to ``x`` and hand the sum to the next layer normalised.

    ``s = x + gate * y``, then ``LayerNorm(s) * scale + shift``: `gated_add` and `modulate` without reading ``s`` back.

    Args:
        x: ``(B, F * T_f, D)`` tokens, frame by frame.
        y: ``(B, F * T_f, D)`` what a layer adds to them.
        gate: ``(B or 1, F, 1, D)``; None adds ``y`` as it is.
        shift: ``(B or 1, F, 1, D)``, or ``(D,)``: the bias of a LayerNorm.
        scale: like ``shift``: already 1 + the predicted scale, or the weight of a LayerNorm.
        eps: of the norm.
        backend: ``"kernel"`` raises where the CUDA kernel can't run; ``"auto"`` falls back to the CPU kernel, where no
            gradient is wanted, and to PyTorch; ``"reference"`` is PyTorch.

    Returns:
        The sum and its modulated norm, each ``(B, F * T_f, D)`` in ``x.dtype``, contiguous. The kernels norm the sum
        as it was before rounding.

    Raises:
        ValueError: shapes or devices disagree.
        RuntimeError: ``backend="kernel"`` and the kernel can't run; says why.

    Source: docs/method.md section 5, conditioning.
    """
    _check(x, y, gate, shift, scale)
    if without_cuda_kernel("gated_modulate", backend, _why_not_kernel("gated_modulate", x, y, gate, shift, scale)):
        if _takes_cpu(backend, x, y, gate, shift, scale):
            return _cpu.gated_modulate(x, y, gate, shift, scale, eps)
        return gated_modulate_ref(x, y, gate, shift, scale, eps)
    if wants_grad(x, y, gate, shift, scale):
        return _GatedModulate.apply(x, y, gate, shift, scale, eps)
    return torch.ops.echo_ext.gated_modulate(x, y, gate, shift, scale, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide each token by its root mean square and scale it.

    Args:
        x: ``(B, T, D)``.
        weight: ``(D,)``.
        eps: added to the mean square.

    Returns:
        ``(B, T, D)`` in ``x.dtype``. Differentiable. On the CPU, where no gradient is wanted, in one pass.

    Source: docs/method.md section 5, norms of queries and keys.
    """
    if x.ndim == 3 and _takes_cpu("auto", x, weight):
        return _cpu.rms_norm(x, weight, eps)
    return torch.rms_norm(x, weight.shape, weight, eps)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The fallback, and in float64 the oracle: differentiable, any device."""
    b, t, d = x.shape
    norm = torch.layer_norm(x, (d,), eps=eps).view(b, shift.size(1), -1, d)
    return torch.addcmul(shift, norm, scale).view(b, t, d)


def gated_add_ref(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The fallback, and in float64 the oracle: differentiable, any device."""
    (b, t, d), frames = x.shape, gate.size(1)
    return torch.addcmul(x.view(b, frames, -1, d), y.view(b, frames, -1, d), gate).view(b, t, d)


def gated_modulate_ref(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The fallback, and in float64 the oracle: differentiable, any device."""
    x = x + y if gate is None else gated_add_ref(x, y, gate)
    if shift.ndim == 1:
        return x, torch.layer_norm(x, (x.size(2),), scale, shift, eps)
    return x, modulate_ref(x, shift, scale, eps)


def _check(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None = None, scale: Tensor | None = None
) -> None:
    shape, device = x.shape, x.device
    if len(shape) != 3:
        raise ValueError(f"x must be (B, T, D), got {tuple(shape)}")
    if y is not None and (y.shape != shape or y.device != device):
        raise ValueError(f"y must be {tuple(shape)} on {device} to match x, got {tuple(y.shape)} on {y.device}")
    good: tuple[int, ...] = ()  # most vectors of a call have one shape: only the first is taken apart
    for name, v in (("gate", gate), ("shift", shift), ("scale", scale)):
        if v is None:
            continue
        if v.device != device:
            raise ValueError(f"{name} is on {v.device}, x is on {device}")
        if v.shape != good:
            affine = name != "gate" and y is not None and (shift is None or shift.ndim == 1)
            good = _check_vector(name, v.shape, shape, affine, good)


def _check_vector(
    name: str, own: torch.Size, shape: torch.Size, affine: bool, before: tuple[int, ...]
) -> tuple[int, ...]:
    """Check the shape of one vector a frame, or of a norm's weight where ``affine``; return it."""
    b, t, d = shape
    if affine:
        if own != (d,):
            raise ValueError(f"{name} must be ({d},) to match x {tuple(shape)}, got {tuple(own)}")
        return own
    if len(own) != 4 or own[2] != 1 or own[3] != d or own[0] not in (1, b):
        raise ValueError(f"{name} must be (1 or {b}, F, 1, {d}) to match x {tuple(shape)}, got {tuple(own)}")
    if not own[1] or t % own[1]:
        raise ValueError(f"{name} has {own[1]} frames, which don't divide the {t} tokens of x")
    if before and own[1] != before[1]:
        raise ValueError(f"{name} has {own[1]} frames, the vectors before it {before[1]}")
    return own


def _why_not_kernel(
    op: str, x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None = None, scale: Tensor | None = None
) -> str | None:
    """The first reason the CUDA kernel of ``op`` can't take its tensors, or None if it can."""
    if reason := why_not_kernel(op, x, "x"):
        return reason
    tensors = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    for name, z in tensors.items():
        if z is not None and z.dtype != x.dtype:
            return f"{name} is {z.dtype}, x is {x.dtype}"
    if x.shape[2] * x.element_size() > MAX_ROW_BYTES:
        return f"a token of {x.shape[2]} {x.dtype} is wider than {MAX_ROW_BYTES} bytes"
    return why_not_vectors(tensors)


def _takes_cpu(backend: Backend, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel for CPUs runs: it has no gradient, and a compiler can't see into it."""
    if backend != "auto" or not x.is_cpu or torch.compiler.is_compiling() or wants_grad(x, *others):
        return False
    return _cpu.why_not_norm(x, *others) is None


class _Modulate(torch.autograd.Function):
    """Op forward; backward recomputes through the reference."""

    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        ctx.save_for_backward(x, shift, scale)
        ctx.eps = eps
        return torch.ops.echo_ext.modulate(x, shift, scale, eps)

    @staticmethod
    def backward(ctx, grad):
        again = functools.partial(modulate_ref, eps=ctx.eps)
        return *recompute(again, ctx.saved_tensors, ctx.needs_input_grad[:3], grad), None


class _GatedAdd(torch.autograd.Function):
    """Op forward; backward recomputes through the reference."""

    @staticmethod
    def forward(ctx, x, y, gate):
        ctx.save_for_backward(x, y, gate)
        return torch.ops.echo_ext.gated_add(x, y, gate)

    @staticmethod
    def backward(ctx, grad):
        return tuple(recompute(gated_add_ref, ctx.saved_tensors, ctx.needs_input_grad, grad))


class _GatedModulate(torch.autograd.Function):
    """Op forward; backward recomputes through the reference."""

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, eps):
        ctx.save_for_backward(x, y, gate, shift, scale)
        ctx.eps = eps
        return torch.ops.echo_ext.gated_modulate(x, y, gate, shift, scale, eps)

    @staticmethod
    def backward(ctx, *grads):
        again = functools.partial(gated_modulate_ref, eps=ctx.eps)
        return *recompute(again, ctx.saved_tensors, ctx.needs_input_grad[:5], grads), None


def _run(op: str, x: Tensor, outputs: dict[str, Tensor], **inputs: Tensor | float | None) -> None:
    given = {"x": x, **inputs, **outputs}
    views = {name: _native.view(z) if isinstance(z, Tensor) else z for name, z in given.items()}
    getattr(_native.module(), f"{op}_fwd")(**views, stream=_native.stream_of(x))


def _modulate_kernel(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _run("modulate", x, {"out": out}, shift=shift, scale=scale, eps=eps)
    return out


def _gated_add_kernel(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _run("gated_add", x, {"sum": out}, y=y, gate=gate)
    return out


def _gated_modulate_kernel(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    _run("gated_modulate", x, {"sum": total, "out": out}, y=y, gate=gate, shift=shift, scale=scale, eps=eps)
    return total, out


register(
    _LIB,
    "modulate",
    kernel=_modulate_kernel,
    cpu=lambda *args: modulate_ref(*args).contiguous(),
    fake=lambda x, *rest: x.new_empty(x.shape),
)
register(
    _LIB,
    "gated_add",
    kernel=_gated_add_kernel,
    cpu=lambda *args: gated_add_ref(*args).contiguous(),
    fake=lambda x, *rest: x.new_empty(x.shape),
)
register(
    _LIB,
    "gated_modulate",
    kernel=_gated_modulate_kernel,
    cpu=lambda *args: tuple(z.contiguous() for z in gated_modulate_ref(*args)),
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
