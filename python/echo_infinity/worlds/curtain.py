"""When the curtain is open: exact schedules in blocks, and endless random ones, both random access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

FRAMES_PER_BLOCK = 3
SLIDE_FRAMES = 3  # pixel frames the curtain takes to open or to close
NEVER = 1 << 40  # frames; stands for "does not open again"


class Schedule(Protocol):
    """Where each frame stands in the curtain's cycle."""

    def intervals(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, per frame, the open interval [start, end) at or after it, and the open frames before ``start``."""
        ...


def block_start(block: int) -> int:
    """Return the first pixel frame of a block: 0 for block 0, else 12 b - 3."""
    return 0 if block == 0 else 4 * FRAMES_PER_BLOCK * block - 3


def closedness(schedule: Schedule, frames: np.ndarray) -> np.ndarray:
    """Return how far the curtain is closed at each frame, 0 open to 1 closed.

    Args:
        schedule: the curtain's schedule.
        frames: ``(n,)`` int64 pixel frame numbers.
    """
    start, end, _ = schedule.intervals(frames)
    step = 1.0 / (SLIDE_FRAMES + 1)
    closed = np.maximum(1 - (frames - start + 1) * step, 1 - (end - frames) * step)
    return np.clip(closed, 0.0, 1.0)


def time_open(schedule: Schedule, frames: np.ndarray) -> np.ndarray:
    """Return the number of frames before each frame at which the curtain was not fully closed."""
    start, _, before = schedule.intervals(frames)
    return before + np.maximum(frames - start, 0)


def time_to_open(schedule: Schedule, frames: np.ndarray) -> np.ndarray:
    """Return the number of frames until the curtain opens, 0 where it is not fully closed."""
    start, _, _ = schedule.intervals(frames)
    return np.maximum(start - frames, 0)


@dataclass(frozen=True)
class BlockSchedule:
    """An exact schedule, one flag a block; the blocks from ``repeat_from`` on repeat for ever.

    Args:
        closed: per block, whether the curtain is closed all through it. Block 0 holds the sink frames.
        repeat_from: first block of the repeated part; by default the last block repeats.
    """

    closed: tuple[bool, ...]
    repeat_from: int | None = None
    _table: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False, compare=False)
    _cycle: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        closed: Sequence[bool] = tuple(bool(c) for c in self.closed)
        repeat = len(closed) - 1 if self.repeat_from is None else self.repeat_from
        if not closed or not closed[0]:
            raise ValueError(f"curtain blocks {closed} must begin with a closed block: the sink shows no objects")
        if not 1 <= repeat < len(closed):
            raise ValueError(f"repeat_from {repeat} must lie in 1..{len(closed) - 1}, within the schedule past block 0")
        # Two unrolled periods are enough: an interval that crosses the seam is whole in the second one.
        period = len(closed) - repeat
        unrolled = list(closed) + list(closed[repeat:]) * 2
        if not any(closed[repeat:]):
            unrolled, period = list(closed), 0
        edges = np.flatnonzero(np.diff(np.array([True, *unrolled, True], dtype=np.int8))).reshape(-1, 2)
        starts = np.array([block_start(int(b)) for b in edges[:, 0]], dtype=np.int64)
        ends = np.array([block_start(int(b)) for b in edges[:, 1]], dtype=np.int64)
        if period == 0:
            ends[-1] = NEVER
        object.__setattr__(self, "closed", closed)
        object.__setattr__(self, "_table", (starts, ends))
        frames_per_block = 4 * FRAMES_PER_BLOCK
        opened = 0 if period == 0 else frames_per_block * sum(not c for c in closed[repeat:])
        object.__setattr__(self, "_cycle", (block_start(repeat), frames_per_block * period, opened))

    def intervals(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, per frame, the open interval at or after it, and the open frames before that interval."""
        starts, ends = self._table
        first, period, opened = self._cycle
        turns = np.maximum(frames - first, 0) // period if period else np.zeros_like(frames)
        turns = np.maximum(turns - 1, 0)  # stay one period in, so that a seam-crossing interval is seen from its start
        index = np.searchsorted(ends, frames - turns * period, side="right")
        before = np.concatenate([[0], np.cumsum(ends - starts)])
        starts = np.append(starts, NEVER)
        ends = np.append(ends, NEVER + 1)
        return starts[index] + turns * period, ends[index] + turns * period, before[index] + turns * opened


@dataclass(frozen=True)
class RandomSchedule:
    """An endless schedule with random durations that respects no block; any frame costs the same.

    Open interval k starts at ``first + k period + g_k`` and lasts ``mean_open + e_{k+1} - e_k`` frames with hashed
    jitters g and e, so that the open frames before it telescope to ``k mean_open + e_k - e_0``.
    """

    seed: int
    first: int = 12
    period: int = 132
    mean_open: int = 36
    start_jitter: int = 24
    open_jitter: int = 16

    def __post_init__(self) -> None:
        shortest = self.period - self.mean_open - self.start_jitter - self.open_jitter
        if shortest < 1 or self.mean_open <= self.open_jitter:
            raise ValueError(
                f"period {self.period} and mean_open {self.mean_open} are too short for jitters "
                f"{self.start_jitter} and {self.open_jitter}; lengthen the period"
            )

    def intervals(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, per frame, the open interval at or after it, and the open frames before that interval."""
        k = np.maximum((frames - self.first) // self.period - 1, 0)
        for _ in range(2):
            k = np.where(frames >= self._interval(k)[1], k + 1, k)
        start, end = self._interval(k)
        return start, end, k * self.mean_open + self._jitter(k, 1) - self._jitter(np.zeros_like(k), 1)

    def _interval(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = self.first + k * self.period + self._jitter(k, 0)
        return start, start + self.mean_open + self._jitter(k + 1, 1) - self._jitter(k, 1)

    def _jitter(self, k: np.ndarray, which: int) -> np.ndarray:
        span = (self.start_jitter, self.open_jitter)[which]
        return (hash64(self.seed, 2 * k + which) % np.uint64(span + 1)).astype(np.int64)


def hash64(seed: int, counter: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits for each counter (splitmix64 finaliser)."""
    with np.errstate(over="ignore"):
        x = counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * np.uint64(0xD1B54A32D192ED03) + np.uint64(0x632BE59BD9B4E019)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
