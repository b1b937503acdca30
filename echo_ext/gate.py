"""The gate of the evolving memory: which share of the state a write keeps, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echo_ext import _native
from echo_ext._autograd import recompute, wants_grad
from echo_ext._dispatch import Backend, register, why_not_kernel, why_not_vectors, without_cuda_kernel

_LIB = torch.library.Library("echo_ext", "FRAGMENT")
_LIB.define("gate_blend(Tensor state, Tensor proposal, Tensor weight, Tensor bias) -> Tensor")


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
    _check(state, proposal, weight, bias)
    args = (state, proposal, weight, bias)
    if without_cuda_kernel("gate_blend", backend, _why_not_kernel(*args)):
        return gate_blend_ref(*args)
    if wants_grad(*args):
        return _GateBlend.apply(*args)
    return torch.ops.echo_ext.gate_blend(*args)


def gate_blend_ref(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The fallback, and in float64 the oracle: differentiable, any device; never builds ``[state ; proposal]``."""
    wide, width = torch.promote_types(state.dtype, torch.float32), state.shape[-1]
    logits = F.linear(state.to(weight.dtype), weight[:, :width], bias).to(wide)
    logits = logits + F.linear(proposal.to(weight.dtype), weight[:, width:])
    return torch.lerp(proposal.to(wide), state.to(wide), logits.sigmoid()).to(state.dtype)


def _check(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> None:
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


def _why_not_kernel(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """The first reason the CUDA kernel can't take these arguments, or None if it can."""
    if reason := why_not_kernel("gate_blend", state, "state"):
        return reason
    if weight.dtype != state.dtype and (state.dtype, weight.element_size()) != (torch.float32, 2):
        return f"{weight.dtype} weights are not built beside a {state.dtype} state: the same, or 16 bits to float32"
    return why_not_vectors({"state": state, "proposal": proposal, "weight": weight, "bias": bias})


def _kernel(state: Tensor, proposal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = state.new_empty(state.shape)
    views = (_native.view(x) for x in (state, proposal, weight, bias, out))
    _native.module().gate_blend_fwd(*views, _native.stream_of(state))
    return out


class _GateBlend(torch.autograd.Function):
    """Op forward; backward recomputes through the reference, so gradients need no second kernel."""

    @staticmethod
    def forward(ctx, state, proposal, weight, bias):
        ctx.save_for_backward(state, proposal, weight, bias)
        return torch.ops.echo_ext.gate_blend(state, proposal, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        return tuple(recompute(gate_blend_ref, ctx.saved_tensors, ctx.needs_input_grad, grad_out))


register(
    _LIB,
    "gate_blend",
    kernel=_kernel,
    cpu=gate_blend_ref,
    fake=lambda state, *rest: state.new_empty(state.shape),
)
