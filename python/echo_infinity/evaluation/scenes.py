"""What stands around the objects of a picture: how far the curtain is closed, and which of the scenes it is."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from echo_infinity.worlds import LOOKS, object_colour
from echo_infinity.worlds.motion import SIZE
from echo_infinity.worlds.render import background, draw_curtain

_CLOTH_DISTANCE = 30.0  # RGB, from the cloth at that column
_CLOTH_ROWS = 0.8  # of a column's rows above the timer bar
_TIMER_FIRST_ROW = 52
OPEN, CLOSED = 0.05, 0.95  # shares of columns with cloth up to which a picture is open, from which it is closed


def curtain_share(frames: Tensor) -> Tensor:
    """Return the share of columns in which curtain shows.

    A column counts if at least 80 % of its pixels above the timer bar are within 30 (RGB) of the cloth there.

    Args:
        frames: ``(..., 3, 64, 64)`` uint8.

    Returns:
        ``(...)`` float32, 0 open to 1 closed.
    """
    above = frames[..., :_TIMER_FIRST_ROW, :].float()
    near = (above - _cloth()).square().sum(-3) <= _CLOTH_DISTANCE**2  # (..., rows, columns)
    return (near.float().mean(-2) >= _CLOTH_ROWS).float().mean(-1)


def scene_of(frame: Tensor) -> str:
    """Return the look whose background is nearest, objects left out, to a frame ``(3, 64, 64)`` uint8."""
    free = object_colour(frame.permute(1, 2, 0)) < 0
    apart = (frame.float() - _backgrounds()).abs().mean(1)  # (looks, H, W)
    return list(LOOKS)[int((apart * free).sum((1, 2)).argmin())]


@functools.cache
def _cloth() -> Tensor:
    canvas = np.zeros((1, 3, SIZE, SIZE), dtype=np.float32)
    draw_curtain(canvas, np.ones(1), np.zeros(1))
    return torch.from_numpy(canvas[0, :, :_TIMER_FIRST_ROW])


@functools.cache
def _backgrounds() -> Tensor:
    return torch.from_numpy(np.stack([background(look) for look in LOOKS.values()]))
