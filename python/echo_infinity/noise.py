"""Counter-based noise: a pure function of (seed, block, step), whatever else the process draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1
_MASK = 2**64 - 1

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
"""``noise(block, step, shape)`` gives float32 on the CPU; step 0 starts a block, step i re-noises before call i."""


def counter_noise(seed: int) -> Noise:
    """Make the noise of a stream.

    Args:
        seed: 0 .. 2**63 - 1.

    Raises:
        ValueError: seed out of range.
    """
    check_seed(seed)

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        key = _mix(_mix(_mix(seed) ^ block) ^ step)
        return torch.randn(shape, generator=torch.Generator().manual_seed(key & MAX_SEED))

    return noise


def check_seed(seed: int) -> int:
    """Return ``seed``, or raise ValueError if it is no whole number in range."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be a whole number in 0 .. {MAX_SEED}, got {seed!r}")
    return seed


def _mix(x: int) -> int:
    """One step of a 64-bit avalanche (splitmix64): neighbouring counters get unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
