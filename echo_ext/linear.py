"""A linear layer and its GELU, through the fastest product that PyTorch has on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

# Multiplications below which oneDNN's own overhead eats its gain in float32: of a product, and of one with GELU.
_SMALL, _SMALL_WITH_GELU = 1 << 21, 1 << 19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """Apply a linear layer, and where asked GELU.

    ``y = x W^T + b``, then ``0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))``. On the CPU, where no gradient is
    wanted, both are one call of oneDNN, which applies the GELU before the product leaves the cache; for float32 PyTorch
    itself asks another library, which keeps to half the vector width on some CPUs.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.
        gelu: whether GELU in its tanh form follows.

    Returns:
        ``(..., N)`` in ``x.dtype``. Differentiable.
    """
    if _pays(x, weight, bias, gelu):
        name, how = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], how)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> bool:
    """Whether oneDNN can take the product and is faster than what PyTorch would call."""
    if not x.is_cpu or x.dtype != weight.dtype or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    wants_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if (wants_grad and torch.is_grad_enabled()) or x.dtype not in _onednn_dtypes():
        return False
    if x.dtype == torch.bfloat16:
        return x.numel() > 0
    return x.numel() * weight.shape[0] >= (_SMALL_WITH_GELU if gelu else _SMALL)


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
