"""Early stop: more training is known to make long rollouts drift more, so the judge measures short ones on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from echo_infinity.evaluation.features import LEVELS
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.evaluation.stats import Slope, drift_slope
from echo_infinity.weights import Checkpoint

Measure = Callable[[Checkpoint], Mapping[str, float]]
"""Returns ``drift``, how fast rollouts of a model drift, 0 where they don't, and what else the log should keep."""


@dataclass(frozen=True)
class DriftProbe:
    """Lets the judge measure short rollouts; a :data:`Measure`.

    Args:
        prompts: one a stream.
        blocks: length of each, from where the window is full.
        seed: of the first stream's noise.
    """

    prompts: tuple[str, ...]
    blocks: int = 160
    seed: int = 0

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Measure a model.

        Returns:
            ``drift``: of the judge's slopes of saturation, contrast and sharpness the largest, a minute and as a share
            of the level; of an interval of slopes the end nearer to 0, and 0 if it holds 0, so that chance alone ends
            no run. And ``motion``, the mean level: a video that stands still drifts least.
        """
        config = checkpoint.config
        rollout = Rollout(checkpoint, None, self.prompts, range(self.seed, self.seed + len(self.prompts)))
        for _ in range(-(-config.window.window_frames // config.window.frames_per_block)):
            rollout.next_block()
        series: dict[str, list[torch.Tensor]] = {name: [] for name in LEVELS}
        for _ in range(self.blocks):
            _, frames = rollout.next_block()
            for name, level in LEVELS.items():
                series[name].append(level(frames).cpu())
        minutes = np.arange(self.blocks) * 4 * config.window.frames_per_block / config.fps / 60
        levels = {name: torch.stack(values, 1).double().numpy() for name, values in series.items()}
        slopes = [
            surely(drift_slope(minutes, x)) / max(float(np.median(x)), 1e-9)
            for name, x in levels.items()
            if name != "motion"
        ]
        return {"drift": max(slopes), "motion": float(levels["motion"].mean())}


def surely(slope: Slope) -> float:
    """Return how steep a slope is at least: the end of its interval nearer to 0, without sign; 0 if it holds 0."""
    return 0.0 if slope.flat else min(abs(slope.low), abs(slope.high))


def should_stop(history: Sequence[float], patience: int, margin: float) -> bool:
    """Say whether the last ``patience`` measures are all worse than the best before them by more than ``margin``.

    Args:
        history: drift at each probe, oldest first.
        patience: probes; 0 never stops.
        margin: in the drift's own unit.
    """
    if not patience or len(history) <= patience:
        return False
    best = min(history[:-patience])
    return all(value > best + margin for value in history[-patience:])
