"""Where objects are: closed forms in the frame number, so that any frame costs the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .curtain import Schedule, time_open

SIZE = 64  # pixels, both ways
SINK_FRAMES = 9  # pixel frames of the sink (3 latent frames), which show no objects that will leave
ENTRY_SPEED = 1.0  # pixels a frame at which objects that stay come in, if late: most of one shows within a block
HIDDEN_FRAMES = 60  # how long a path keeps an object out of sight; the local window is 36 pixel frames


@dataclass(frozen=True)
class ObjectSpec:
    """One object: its looks and the constants of its motion, lengths in pixels, times in frames."""

    colour: str
    shape: str
    size: str
    radius: float
    place: tuple[
        float, float
    ]  # curtain: place at time 0; open: (unused, y at time 0); path: (x offset, y at mid-frame)
    velocity: tuple[float, float]  # pixels a frame; on a path: speed along x, slope dy/dx
    delay: float = 0.0  # open and path: frame at which the object's edge touches the frame's


def centres(spec: ObjectSpec, kind: str, schedule: Schedule | None, frames: np.ndarray) -> np.ndarray:
    """Return the object's centre at each frame.

    Args:
        spec: the object.
        kind: "open", "path" or "curtain".
        schedule: the curtain's schedule, for kind "curtain".
        frames: ``(n,)`` int64 pixel frame numbers.

    Returns:
        ``(n, 2)`` float64 (x, y); pixel (row i, column j) has its middle at (j + 0.5, i + 0.5).
    """
    low, high = spec.radius + 1.0, SIZE - spec.radius - 1.0
    vx, vy = spec.velocity
    if kind == "curtain":
        assert schedule is not None
        t = time_open(schedule, frames).astype(np.float64)
        return np.stack([_bounce(spec.place[0], vx, t, low, high), _bounce(spec.place[1], vy, t, low, high)], -1)
    t = frames - spec.delay
    if kind == "open":
        inward = ENTRY_SPEED * t - spec.radius  # in from the left edge, then at its own speed
        drifted = abs(vx) * np.maximum(inward - low, 0.0) / ENTRY_SPEED
        x = np.where(inward < low, inward, _bounce(low, 1.0, drifted, low, high))
        return np.stack([x if vx > 0 else SIZE - x, _bounce(spec.place[1], vy, frames * 1.0, low, high)], -1)
    # A path crosses the frame, turns HIDDEN_FRAMES / 2 after leaving it and comes back along the same line.
    reach = SIZE / 2 + spec.radius + abs(vx) * HIDDEN_FRAMES / 2
    entry = -SIZE / 2 - spec.radius
    x = _bounce(entry, 1.0, abs(vx) * t, -reach, reach)
    x = x if vx > 0 else -x
    return np.stack([SIZE / 2 + x, spec.place[1] + vy * x], -1)


def _bounce(start: float, velocity: float, time: np.ndarray, low: float, high: float) -> np.ndarray:
    span = high - low
    folded = np.mod(start - low + velocity * time, 2 * span)
    return low + np.minimum(folded, 2 * span - folded)
