"""Early stop: more training is known to make long rollouts drift more, so short ones are measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_infinity.codec import to_uint8
from echo_infinity.noise import counter_noise
from echo_infinity.policies import make_sampler
from echo_infinity.weights import Checkpoint

Measure = Callable[[Checkpoint], float]
"""Returns how fast rollouts of a model drift; 0 is not at all."""


@dataclass(frozen=True)
class DriftProbe:
    """Measures how saturation and contrast of short rollouts run away; a :data:`Measure`.

    Args:
        prompts: one a stream.
        blocks: length of each.
        seed: of the noise.
    """

    prompts: tuple[str, ...]
    blocks: int = 40
    seed: int = 0

    @torch.inference_mode()
    def __call__(self, checkpoint: Checkpoint) -> float:
        """Return the larger relative slope of the two, a minute, its sign left out.

        Saturation is the mean over pixels of max - min over RGB, contrast the standard deviation of grey levels;
        slopes after Theil and Sen, over the blocks' means over all streams, as a share of the median.
        """
        text = checkpoint.model.encode_text(checkpoint.text.encode(list(self.prompts)))
        sampler = make_sampler(checkpoint, None, text, counter_noise(self.seed), len(self.prompts))
        state, rows = None, []
        for _ in range(self.blocks):
            pixels, state = checkpoint.codec.decode(sampler.next_block(), state)
            frames = to_uint8(pixels).float()  # (B, N, 3, H, W)
            saturation = (frames.amax(2) - frames.amin(2)).mean()
            contrast = frames.mean(2).std(dim=(2, 3)).mean()
            rows.append(torch.stack([saturation, contrast]))
        minutes = 4 * checkpoint.config.window.frames_per_block / checkpoint.config.fps / 60
        series = torch.stack(rows).double()  # (blocks, 2)
        slopes = [theil_sen(column) / column.median().clamp_min(1e-9) / minutes for column in series.T]
        return max(abs(slope.item()) for slope in slopes)


def theil_sen(values: Tensor) -> Tensor:
    """Return the median slope between all pairs of equally spaced values, a step."""
    n = len(values)
    i, j = torch.triu_indices(n, n, offset=1)
    return ((values[j] - values[i]) / (j - i)).median()


def should_stop(history: Sequence[float], patience: int, margin: float) -> bool:
    """Say whether the last ``patience`` measures are all worse than the best before them by more than ``margin``.

    Args:
        history: drift at each probe, oldest first.
        patience: probes; 0 never stops.
        margin: as a share of the best.
    """
    if not patience or len(history) <= patience:
        return False
    best = min(history[:-patience])
    return all(value > best * (1 + margin) for value in history[-patience:])
