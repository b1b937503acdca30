"""Intervals and slopes: Wilson for shares, Theil-Sen with a bootstrap for drift."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_POINTS = 30  # a series is averaged down to this many points: pairs of points grow with the square


@dataclass(frozen=True)
class Share:
    """``right`` of ``n``, with the 95 % Wilson interval of the share."""

    right: int
    n: int

    @property
    def share(self) -> float:
        """The share, NaN of nothing."""
        return self.right / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Slope:
    """Change per unit of time, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of ``right`` of ``n``; (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def drift_slope(times: np.ndarray, values: np.ndarray, *, draws: int = 1000, seed: int = 0) -> Slope:
    """Fit one slope to the series of several streams: the median slope over all pairs of points of the same stream.

    The interval is a bootstrap's: streams are drawn with replacement, and within a stream runs of neighbouring points,
    since what a minute of video looks like depends on the minute before.

    Args:
        times: ``(n,)``.
        values: ``(streams, n)``; NaN where a stream has no value.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The slope in units of ``values`` per unit of ``times``; NaN with fewer than two points.

    Raises:
        ValueError: shapes disagree.

    Source: Theil (1950), Sen (1968); moving blocks after Kuensch (1989).
    """
    values = np.asarray(values, dtype=np.float64)
    times = np.asarray(times, dtype=np.float64)
    if values.ndim != 2 or times.shape != values.shape[1:]:
        raise ValueError(f"values must be (streams, n) for {times.shape} times, got {values.shape}")
    times, values = _thin(times, values)
    streams, n = values.shape
    if n < 2:
        return Slope(float("nan"), float("nan"), float("nan"))
    apart = times[:, None] - times[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (values[:, :, None] - values[:, None, :]) / apart  # (streams, n, n), NaN on the diagonal
    run = max(1, round(n ** (1 / 3)))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        picked = []
        for stream in np.atleast_1d(rng.integers(streams, size=streams)):
            starts = rng.integers(n - run + 1, size=-(-n // run))
            index = (starts[:, None] + np.arange(run)).ravel()[:n]
            picked.append(slopes[stream][np.ix_(index, index)].ravel())
        drawn.append(_median(np.concatenate(picked)))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Slope(_median(slopes.ravel()), float(low), float(high))


def _median(x: np.ndarray) -> float:
    kept = x[np.isfinite(x)]
    return float(np.median(kept)) if len(kept) else float("nan")


def _thin(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours down to at most ``_POINTS`` points."""
    n = len(times)
    if n <= _POINTS:
        return times, values
    edges = np.linspace(0, n, _POINTS + 1).round().astype(int)
    parts = list(itertools.pairwise(edges))
    return np.array([times[a:b].mean() for a, b in parts]), np.stack([values[:, a:b].mean(1) for a, b in parts], 1)
