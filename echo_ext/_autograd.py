"""Gradients of kernels: computed again through the reference, so that no op needs a second kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of ``tensors`` asks for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def recompute(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``function(*saved)`` for the inputs that need one, None for the others."""
    inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(saved, needs, strict=True)]
    with torch.enable_grad():
        out = function(*inputs)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if x is not None and need]
    found = iter(torch.autograd.grad(out, wanted, grads))
    return [next(found) if need else None for need in needs]
