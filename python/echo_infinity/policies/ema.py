"""A running mean of everything that left, place by place."""

from __future__ import annotations

import torch

from echo_infinity.cache import Call
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.tier import Layered, Tier, TierPolicy
from echo_infinity.recall import Recall

DECAY = 0.9


class MovingAverage(TierPolicy):
    """Sink, one block of averaged keys and values a layer, window.

    The tier starts as the first block that leaves; then ``tier = 0.9 tier + 0.1 gone``, keys before rotation, frame by
    frame and token by token. It is seen at the memory's ids.

    Source: the EMA sink of arXiv 2512.04678, as a tier of its own beside the sink.
    """

    name = "ema"

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return a stream's averages."""
        return _Average(config, batch)


class _Average(Tier):
    def fold(self, state: Layered | None, gone: Layered, frames: range) -> Layered:
        if state is None:
            return gone
        return Layered(*(old.lerp(new, 1 - DECAY) for old, new in zip(state, gone, strict=True)))

    def place(self, state: Layered, call: Call) -> tuple[Layered, list[float]]:
        return state, list(call.ids.memory)
