"""A sink whose content rolls through the start of the stream instead of standing still."""

from __future__ import annotations

from dataclasses import replace

import torch

from echo_infinity.cache import Call
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.tier import Layered, Tier, TierPolicy
from echo_infinity.recall import Recall


class RollingSink(TierPolicy):
    """One block of the stream's first ``p_max`` frames and the last ``window_frames - sink_frames`` frames.

    The first ``p_max`` frames are kept as they leave. Of their N blocks each call sees one: block r at the r-th block
    after the window is full, there and back again (0 .. N-1, N-2 .. 1, 0 ..), at the memory's ids, which slide along
    with the window. Later frames that leave are forgotten.

    Source: sliding indices and sliding semantics of Rolling Sink, arXiv 2602.07775, in our reading.
    """

    name = "rolling"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        config = super()._configure(config)
        return replace(config, window=replace(config.window, sink_frames=0, window_frames=config.window.local_frames))

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return a stream's first frames."""
        return _Start(config, batch)


class _Start(Tier):
    def fold(self, state: Layered | None, gone: Layered, frames: range) -> Layered:
        if state is None:
            return gone
        w = self.config.window
        whole = w.p_max // w.frames_per_block * w.frames_per_block
        return state.then(gone) if frames.stop <= whole else state

    def place(self, state: Layered, call: Call) -> tuple[Layered, list[float]]:
        w = self.config.window
        block = w.frames_per_block * self.tokens_per_frame
        step = (call.start - w.local_frames) // w.frames_per_block
        shown = min(there_and_back(step, w.p_max // w.frames_per_block), state.k.shape[2] // block - 1)
        return state.tokens(shown * block, (shown + 1) * block), list(call.ids.memory)


def there_and_back(step: int, count: int) -> int:
    """Return ``step`` 0, 1, .. folded to 0 .. count - 1 and back again."""
    at = step % max(1, 2 * count - 2)
    return min(at, 2 * count - 2 - at) if count > 1 else 0
