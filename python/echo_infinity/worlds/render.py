"""Drawing: backgrounds, antialiased shapes in small windows, and the curtain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .colours import CURTAIN_COLOUR, FOLD_DEPTH, OBJECT_COLOURS, TIMER_COLOUR, Look
from .motion import SIZE, ObjectSpec

_WINDOW = 26  # pixels; holds the largest shape (radius 11) and its soft edge
_OFFSETS = (np.arange(_WINDOW, dtype=np.float32) + 0.5).astype(np.float32)
_TIMER_ROWS = slice(53, 59)
_TIMER_LEFT, _TIMER_LENGTH = 4, 56
_TIMER_SCALE = 0.5  # pixels a frame: a block of 12 frames is 6 pixels, the bar is full at 112 frames


@dataclass
class Coverage:
    """How much of each pixel an object covers, in a window that follows it through ``n`` frames."""

    alpha: np.ndarray  # (n, 26, 26) float32
    corner: np.ndarray  # (n, 2) int64 row and column of the window's first pixel

    def _index(self) -> np.ndarray:
        span = np.arange(_WINDOW)
        first = self.corner[:, 0] * SIZE + self.corner[:, 1]
        return (first[:, None, None] + span[:, None] * SIZE + span).reshape(len(first), -1)

    def paint(self, canvas: np.ndarray, colour: str) -> None:
        """Blend the colour into ``canvas`` ``(n, 3, 64, 64)`` float32, in place."""
        flat = canvas.reshape(len(canvas), 3, SIZE * SIZE)
        seen = np.flatnonzero(self.alpha.any((1, 2)))
        index, alpha = self._index()[seen], self.alpha.reshape(len(canvas), -1)[seen]
        rows = seen[:, None]
        for channel, value in enumerate(OBJECT_COLOURS[colour]):
            below = flat[rows, channel, index]
            flat[rows, channel, index] = below + alpha * (value - below)

    def dense(self) -> np.ndarray:
        """Return ``(n, 64, 64)`` float32 coverage of the whole frame."""
        full = np.zeros((len(self.alpha), SIZE * SIZE), dtype=np.float32)
        np.put_along_axis(full, self._index(), self.alpha.reshape(len(self.alpha), -1), 1)
        return full.reshape(-1, SIZE, SIZE)


def object_coverage(spec: ObjectSpec, centre: np.ndarray) -> Coverage:
    """Return the antialiased coverage of an object with the given centres.

    Args:
        spec: shape and radius.
        centre: ``(n, 2)`` float64 (x, y).
    """
    corner = np.clip(np.floor(centre).astype(np.int64) - _WINDOW // 2, 0, SIZE - _WINDOW)
    x = _OFFSETS[None, None, :] + (corner[:, 0] - centre[:, 0]).astype(np.float32)[:, None, None]
    y = _OFFSETS[None, :, None] + (corner[:, 1] - centre[:, 1]).astype(np.float32)[:, None, None]
    alpha = np.clip(0.5 - _distance(spec.shape, spec.radius, x, y), 0.0, 1.0)
    return Coverage(alpha, corner[:, ::-1])


def _distance(shape: str, r: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance to the shape's edge (exact or a bound near it), negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(r)
    if shape == "square":
        return np.maximum(ax, ay) - np.float32(0.86 * r)
    if shape == "diamond":
        return (ax + ay - np.float32(1.12 * r)) * np.float32(np.sqrt(0.5))
    if shape == "triangle":  # upright, flat side down
        slant = (ax * np.float32(1.8) - (y + np.float32(r))) * np.float32(1 / np.hypot(1.8, 1.0))
        return np.maximum(slant, y - np.float32(0.8 * r))
    if shape == "cross":
        arm = np.float32(0.36 * r)
        return np.maximum(np.minimum(ax, ay) - arm, np.maximum(ax, ay) - np.float32(r))
    raise ValueError(f"shape {shape!r} can't be drawn; use a shape of the grammar")


def background(look: Look) -> np.ndarray:
    """Return the scene without objects, ``(3, 64, 64)`` float32: a sky gradient over ground with faint furrows."""
    row = np.arange(SIZE, dtype=np.float32)
    horizon = look.horizon * SIZE
    down = np.clip(row / horizon, 0, 1)[:, None]
    sky = np.asarray(look.sky_top) * (1 - down) + np.asarray(look.sky_low) * down
    furrow = 3.0 * np.cos((row - horizon) * (2 * np.pi / 16))[:, None]
    ground = np.asarray(look.ground) + furrow
    below = np.clip(row + 1 - horizon, 0, 1)[:, None]
    colour = (sky * (1 - below) + ground * below).astype(np.float32)
    return np.repeat(colour.T[:, :, None], SIZE, axis=2)


def curtain_edges(closed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns [left, right) that a curtain closed so far leaves free; its halves meet in the middle."""
    width = np.round(closed * (SIZE / 2)).astype(np.int64)
    return width, SIZE - width


def draw_curtain(canvas: np.ndarray, closed: np.ndarray, frames_to_open: np.ndarray) -> None:
    """Draw the curtain, and on the closed one the timer bar, over ``canvas`` ``(n, 3, 64, 64)`` float32, in place."""
    some = np.flatnonzero(closed > 0)
    if not len(some):
        return
    cloth = np.asarray(CURTAIN_COLOUR, dtype=np.float32)[:, None] + FOLD_DEPTH * _FOLDS
    for frame, left, right in zip(some, *curtain_edges(closed[some]), strict=True):
        canvas[frame, :, :, :left] = cloth[:, None, :left]
        canvas[frame, :, :, right:] = cloth[:, None, right:]
    length = np.minimum(frames_to_open * _TIMER_SCALE, _TIMER_LENGTH).astype(np.float32)[some]
    fill = np.clip(length[:, None] - np.arange(_TIMER_LENGTH, dtype=np.float32), 0, 1)[:, None, None, :]
    columns = slice(_TIMER_LEFT, _TIMER_LEFT + _TIMER_LENGTH)
    cloth_part = cloth[None, :, None, columns]
    bar = cloth_part + fill * (np.asarray(TIMER_COLOUR, dtype=np.float32)[None, :, None, None] - cloth_part)
    closed_now = some[closed[some] >= 1]
    canvas[closed_now, :, _TIMER_ROWS, columns] = bar[closed[some] >= 1]


_FOLDS = np.cos((np.arange(SIZE, dtype=np.float32) + 0.5) * np.float32(2 * np.pi / 16))
