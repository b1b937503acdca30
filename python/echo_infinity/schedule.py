"""Flow-matching noise levels: the sigma table, warped steps, noising, and flow <-> x0."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TRAIN_STEPS = 1000


class FlowSchedule:
    """Sigmas and timesteps of a shifted linear schedule.

    ``sigma' = shift * sigma / (1 + (shift - 1) * sigma)`` over ``linspace(1, 0, 1001)[:-1]``; ``t = 1000 * sigma'``.

    Args:
        shift: how far the levels lean towards noise; 5 for the official model.

    Raises:
        ValueError: ``shift`` is not positive.

    Source: docs/method.md section 5.
    """

    def __init__(self, shift: float = 5.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift = shift
        sigma = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
        self.sigmas = shift * sigma / (1 + (shift - 1) * sigma)  # (1000,) float32
        self.timesteps = self.sigmas * TRAIN_STEPS

    def warp(self, steps: tuple[float, ...]) -> list[float]:
        """Map steps such as 750 to the timestep at index ``1000 - 750`` of the shifted table.

        Raises:
            ValueError: a step is no whole number in 0 .. 1000.
        """
        if any(s not in range(TRAIN_STEPS + 1) for s in steps):
            raise ValueError(f"steps must be whole numbers in 0 .. {TRAIN_STEPS}, got {steps}")
        table = [*self.timesteps.tolist(), 0.0]
        return [table[TRAIN_STEPS - int(s)] for s in steps]

    @functools.lru_cache(maxsize=64)  # noqa: B019  a schedule lives as long as its model
    def sigma(self, t: float) -> float:
        """Sigma of the table entry nearest to timestep ``t``; ``t = 0`` gives the last entry, not 0."""
        return self.sigmas[(self.timesteps - t).abs().argmin()].item()

    def add_noise(self, x0: Tensor, noise: Tensor, t: float) -> Tensor:
        """``(1 - sigma) x0 + sigma noise`` in ``x0``'s dtype."""
        sigma = self.sigma(t)
        return (1 - sigma) * x0 + sigma * noise

    def to_x0(self, x_t: Tensor, flow: Tensor, t: float) -> Tensor:
        """``x_t - sigma * flow``, computed in float64 and cast back."""
        return (x_t.double() - self.sigma(t) * flow.double()).to(x_t.dtype)

    def to_flow(self, x_t: Tensor, x0: Tensor, t: float) -> Tensor:
        """``(x_t - x0) / sigma``, computed in float64 and cast back."""
        return ((x_t.double() - x0.double()) / self.sigma(t)).to(x_t.dtype)
