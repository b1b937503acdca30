"""Every loss of every stage, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_STANDS_OUT = 2.0  # mean square over channels, of latents with unit variance


def per_sample(sigma: Tensor) -> Tensor:
    """Noise levels of samples ``(B,)`` or of their frames ``(B, F)``, to be broadcast to ``(B, F, C, h, w)``."""
    return sigma.reshape(len(sigma), -1, 1, 1, 1)


def shift_level(u: Tensor, shift: float) -> Tensor:
    """Lean uniform levels towards noise: ``shift u / (1 + (shift - 1) u)``."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) x0 + sigma noise``, levels as in :func:`per_sample`."""
    return (1 - per_sample(sigma)) * x0 + per_sample(sigma) * noise


def to_x0(x_t: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """``x_t - sigma flow``, levels as in :func:`per_sample`."""
    return x_t - per_sample(sigma) * flow


def flow_loss(flow: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean square error of a predicted flow, ``(B,)``; the target is ``noise - x0``.

    Args:
        flow: ``(B, F, C, h, w)``.
        x0: clean latents, likewise.
        noise: likewise.
        weight: of each latent, broadcast to them; relative to its mean over a sample.

    Source: docs/method.md section 5.
    """
    square = (flow - (noise - x0)).square()
    if weight is not None:
        square = square * (weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True))
    return square.mean(dim=(1, 2, 3, 4))


def object_share(latents: Tensor) -> Tensor:
    """How much each latent stands out from its row, 0 .. 1: scenes are the same all along a row, objects are not.

    Args:
        latents: ``(B, F, C, h, w)``, normalised.

    Returns:
        ``(B, F, 1, h, w)``.
    """
    away = (latents - latents.median(dim=-1, keepdim=True).values).square().mean(dim=2, keepdim=True)
    return (away / _STANDS_OUT).clamp(max=1.0)


def x0_loss(predicted: Tensor, x0: Tensor) -> Tensor:
    """Mean square error of predicted clean latents, ``(B,)``: the regression onto a teacher's trajectory."""
    return (predicted - x0).square().mean(dim=(1, 2, 3, 4))


def score_level(u: Tensor, shift: float, low: float = 0.02, high: float = 0.98) -> Tensor:
    """Turn uniform numbers into the noise levels of scores: ``low .. high``, then shifted.

    Source: docs/method.md section 7.
    """
    return shift_level(low + (high - low) * u, shift)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``unconditional + scale (conditional - unconditional)``."""
    return unconditional + scale * (conditional - unconditional)


def dmd_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """Gradient of distribution matching distillation with respect to generated latents.

    ``(fake_x0 - real_x0) / mean|x0 - real_x0|``, the mean over each sample.

    Args:
        x0: ``(B, F, C, h, w)`` generated latents.
        real_x0: what the teacher makes of them once noised.
        fake_x0: what the fake score makes of them.

    Returns:
        ``(B, F, C, h, w)``, without history; 0 where a sample equals the teacher's in every element.

    Source: docs/method.md section 7.
    """
    with torch.no_grad():
        size = (x0 - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        return torch.nan_to_num((fake_x0 - real_x0) / size, nan=0.0, posinf=0.0, neginf=0.0)


def surrogate_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """``0.5 mean (x0 - (x0 - gradient))^2`` per sample, ``(B,)``, the bracket held fixed.

    Its gradient with respect to ``x0`` is ``gradient`` over the number of elements of a sample.

    Source: docs/method.md section 7.
    """
    target = (x0.double() - gradient.double()).detach()
    return 0.5 * (x0.double() - target).square().mean(dim=(1, 2, 3, 4))
