"""Frames that left, each pooled to fewer tokens: a longer window at a lower resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_infinity.cache import Call
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.policies.tier import Layered, Tier, TierPolicy
from echo_infinity.recall import Recall

CELL = 2, 2  # rows and columns of tokens that become one
RATIO = CELL[0] * CELL[1]


class MeanPooled(TierPolicy):
    """Sink, the last ``4 * frames_per_block`` frames that left, each pooled 4 to 1, window.

    Keys before rotation and values are averaged over cells of 2 x 2 tokens. The tier holds as many tokens as a block;
    the oldest pooled frame leaves it for ever. Pooled frames stand at the centres of their cells, four of them to one
    temporal id of the memory's, the newest next to the window.
    """

    name = "pooled"

    def _configure(self, config: EchoConfig) -> EchoConfig:
        rows, columns = config.grid
        if rows % CELL[0] or columns % CELL[1]:
            raise ValueError(f"policy 'pooled' averages cells of 2 x 2 tokens, a frame has {rows} x {columns}")
        return super()._configure(config)

    def recall(
        self, module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
    ) -> Recall | None:
        """Return a stream's pooled frames."""
        return _Pool(config, batch)


class _Pool(Tier):
    def fold(self, state: Layered | None, gone: Layered, frames: range) -> Layered:
        pooled = Layered(*(self._pool(x, len(frames)) for x in gone))
        held = pooled if state is None else state.then(pooled)
        return held.tokens(max(0, held.k.shape[2] - self.frames * self.tokens_per_frame))

    def place(self, state: Layered, call: Call) -> tuple[Layered, list[float]]:
        first, places = call.ids.memory.start, self.frames * RATIO
        ids = [first + (i + 0.5) / RATIO - 0.5 for i in range(places)]
        return state, ids[places - state.k.shape[2] * RATIO // self.tokens_per_frame :]

    def grid(self) -> tuple[int, int]:
        rows, columns = self.config.grid
        return rows // CELL[0], columns // CELL[1]

    def _pool(self, x: Tensor, frames: int) -> Tensor:
        rows, columns = self.grid()
        cells = x.unflatten(2, (frames, rows, CELL[0], columns, CELL[1]))  # (layers, B, F, r, 2, c, 2, H, d)
        return cells.mean((4, 6)).flatten(2, 4)
