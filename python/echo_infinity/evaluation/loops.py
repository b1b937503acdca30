"""Does a video repeat itself? Self-similarity of its blocks at every lag, over a fixed stretch of the past."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

HISTORY = 512  # blocks; at 12 frames a block and 16 frames a second 6.4 minutes
_RETURNS = 0.1  # of the variance: at most this far from what it was a period ago
_LEAVES = 0.5  # in between it was at least this far
_STILL = 1e-4  # spread of the thumbnails, in units of the normalised latents, below which nothing happens
_GRID = 4


def thumbnails(latents: Tensor) -> Tensor:
    """Shrink blocks ``(B, F, C, h, w)`` to ``(B, 16 C)``: their mean over frames on a 4 x 4 grid."""
    return nnf.adaptive_avg_pool2d(latents.float().mean(1), _GRID).flatten(1)


def distances(past: Tensor) -> Tensor:
    """Return how far a series is from itself at each lag, in units of its spread.

    ``D(L) = mean_t |z_t - z_(t-L)|^2 / (2 mean_t |z_t - z_mean|^2)``: about 1 for unrelated blocks, 0 for a repetition.

    Args:
        past: ``(n, d)``, oldest first.

    Returns:
        ``(n // 2 + 1,)``, index L; all NaN where nothing changes.
    """
    centred = (past - past.mean(0)).double()
    spread = centred.square().sum(1).mean()
    lags = len(past) // 2 + 1
    if len(past) < 2 or (spread / past.shape[1]).sqrt() < _STILL:
        return torch.full((lags,), float("nan"), dtype=torch.float64)
    apart = [(centred[lag:] - centred[: len(past) - lag]).square().sum(1).mean() for lag in range(lags)]
    return torch.stack(apart) / (2 * spread)


def period(past: Tensor) -> int | None:
    """Return the shortest lag at which a series comes back to what it was, having gone away in between.

    A lag L counts where ``D(L) <= 0.1``, D is no larger there than at both neighbours, and ``D >= 0.5`` at some shorter
    lag. A frozen series has no period, and neither has one that only drifts.

    Args:
        past: ``(n, d)``, oldest first; lags up to n / 2 are looked at.
    """
    d = distances(past).tolist()
    farthest = 0.0
    for lag in range(1, len(d) - 1):
        if farthest >= _LEAVES and d[lag] <= _RETURNS and d[lag] <= min(d[lag - 1], d[lag + 1]):
            return lag
        farthest = max(farthest, d[lag])
    return None


class LoopWatch:
    """The last ``HISTORY`` thumbnails of streams side by side; constant in size.

    Args:
        batch: streams.
        width: of a thumbnail.
    """

    def __init__(self, batch: int, width: int) -> None:
        self._past = torch.zeros(HISTORY, batch, width)
        self._count = 0

    def push(self, latents: Tensor) -> None:
        """Take the next block ``(B, F, C, h, w)`` of every stream."""
        self._past[self._count % HISTORY] = thumbnails(latents).cpu()
        self._count += 1

    def periods(self) -> list[int | None]:
        """Return each stream's period in blocks, or None."""
        held = min(self._count, HISTORY)
        first = self._count - held
        order = [i % HISTORY for i in range(first, self._count)]
        return [period(self._past[order, i]) for i in range(self._past.shape[1])]

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`load_tensors` takes back."""
        return {"past": self._past, "count": torch.tensor(self._count)}

    def load_tensors(self, named: dict[str, Tensor]) -> None:
        """Go on from copies of what :meth:`tensors` returned."""
        self._past, self._count = named["past"].clone(), int(named["count"])
