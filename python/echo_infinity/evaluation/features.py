"""What video looks like in a few numbers, and how far two sets of blocks are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def block_features(latents: Tensor) -> Tensor:
    """Describe blocks by the autoencoder's latents: mean, spread and change of every channel.

    Args:
        latents: ``(B, F, C, h, w)``, normalised codec latents of one block each.

    Returns:
        ``(B, 3 C)``: mean and standard deviation over frames and places, mean absolute change from frame to frame.
    """
    x = latents.float()
    change = (x[:, 1:] - x[:, :-1]).abs().mean(dim=(1, 3, 4))
    return torch.cat([x.mean(dim=(1, 3, 4)), x.std(dim=(1, 3, 4)), change], dim=1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    Args:
        a: ``(n, d)`` features, ``n >= 2``.
        b: ``(m, d)`` features, ``m >= 2``.

    Raises:
        ValueError: too few rows, or widths differ.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"need two sets of at least 2 rows of one width, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    # tr (C_a C_b)^(1/2) = sum of square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def motion(frames: Tensor) -> Tensor:
    """Mean absolute change from pixel frame to pixel frame, in grey levels.

    Args:
        frames: ``(B, N, 3, H, W)`` uint8, ``N >= 2``.

    Returns:
        ``(B,)`` float32.
    """
    x = frames.float()
    return (x[:, 1:] - x[:, :-1]).abs().mean(dim=(1, 2, 3, 4))


def saturation(frames: Tensor) -> Tensor:
    """Mean saturation of HSV, ``(max - min) / max`` over a pixel's channels and 0 where it is black, in percent.

    Args:
        frames: ``(B, N, 3, H, W)`` uint8.

    Returns:
        ``(B,)`` float32.
    """
    high, low = frames.amax(2).float(), frames.amin(2).float()
    return 100 * ((high - low) / high.clamp(min=1)).mean(dim=(1, 2, 3))


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of a frame's luma, averaged over frames, in grey levels.

    Args:
        frames: ``(B, N, 3, H, W)`` uint8.

    Returns:
        ``(B,)`` float32.
    """
    return _luma(frames).flatten(2).std(2, correction=0).mean(1)


def sharpness(frames: Tensor) -> Tensor:
    """Mean absolute Laplacian (four neighbours) of the luma, in grey levels.

    Args:
        frames: ``(B, N, 3, H, W)`` uint8, ``H, W >= 3``.

    Returns:
        ``(B,)`` float32.
    """
    y = _luma(frames)
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return (around - 4 * y[..., 1:-1, 1:-1]).abs().mean(dim=(1, 2, 3))


def _luma(frames: Tensor) -> Tensor:
    """BT.601 luma ``(B, N, H, W)`` in grey levels."""
    red, green, blue = frames.float().unbind(2)
    return 0.299 * red + 0.587 * green + 0.114 * blue


LEVELS = {"saturation": saturation, "contrast": contrast, "sharpness": sharpness, "motion": motion}
