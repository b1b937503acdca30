"""Object colours and the looks of the scenes, far enough apart to tell them by nearest colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "orange": (250, 140, 10),
    "yellow": (250, 240, 50),
    "green": (20, 165, 45),
    "cyan": (20, 215, 225),
    "blue": (35, 55, 225),
    "magenta": (200, 20, 200),
    "pink": (255, 140, 200),
}
COLOUR_NAMES: tuple[str, ...] = tuple(OBJECT_COLOURS)


@dataclass(frozen=True)
class Look:
    """Colours of one scene: sky at the top and at the horizon, ground, and the horizon's row."""

    sky_top: tuple[int, int, int]
    sky_low: tuple[int, int, int]
    ground: tuple[int, int, int]
    horizon: float  # share of the height above the ground


LOOKS: dict[str, Look] = {
    "dark field": Look((26, 26, 34), (40, 40, 48), (46, 52, 44), 0.34),
    "bright meadow": Look((176, 196, 212), (206, 214, 216), (150, 172, 128), 0.28),
    "dusky desert": Look((92, 78, 96), (150, 120, 116), (158, 132, 108), 0.40),
    "snowy plain": Look((170, 176, 186), (198, 202, 208), (224, 228, 232), 0.31),
    "misty shore": Look((128, 140, 144), (150, 158, 158), (112, 112, 100), 0.45),
    "night sea": Look((10, 12, 26), (22, 26, 46), (24, 40, 66), 0.37),
}

CURTAIN_COLOUR = (96, 88, 92)
FOLD_DEPTH = 14.0  # grey levels between a fold's crest and its mean
TIMER_COLOUR = (236, 234, 226)


def nearest_colour(pixels: torch.Tensor) -> torch.Tensor:
    """Return the index of the object colour nearest to each pixel.

    Args:
        pixels: ``(..., 3)`` RGB, 0..255, any dtype.

    Returns:
        ``(...)`` int64 indices into ``COLOUR_NAMES``.

    Raises:
        ValueError: the last dim is not 3.
    """
    return _distances(pixels).argmin(-1)


def object_colour(pixels: torch.Tensor, max_distance: float = 60.0) -> torch.Tensor:
    """Return the index of each pixel's object colour, or -1 where no object colour is near.

    Args:
        pixels: ``(..., 3)`` RGB, 0..255, any dtype.
        max_distance: largest Euclidean distance that still counts.

    Returns:
        ``(...)`` int64 indices into ``COLOUR_NAMES`` or -1.

    Raises:
        ValueError: the last dim is not 3.
    """
    distance, index = _distances(pixels).min(-1)
    return torch.where(distance <= max_distance, index, torch.full_like(index, -1))


def _distances(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.shape[-1] != 3:
        raise ValueError(f"pixels must end in 3 channels, got shape {tuple(pixels.shape)}; permute channels last")
    palette = torch.tensor(list(OBJECT_COLOURS.values()), dtype=torch.float32, device=pixels.device)
    apart = pixels.float().unsqueeze(-2) - palette
    return apart.square().sum(-1).sqrt()  # norm() takes ten times as long over three numbers
