"""Watch a stream: every block's readings and writings, taken beside it; a stream that is not watched pays nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from echo_ext.memory import RopeTables, Segment
from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.inspection.attention import Writing, explain_reading, explain_writing
from echo_infinity.memory import EvolvingMemory
from echo_infinity.recall import StreamMemory
from echo_infinity.sampler import BlockSampler

_CELLS = 1 << 20  # of a write's attention that are kept: beyond, every so many memory tokens


@dataclass
class BlockView:
    """What happened in one block.

    Args:
        block: its number.
        tiers: ``(steps, layers, H, 3)`` attention on sink, memory and local frames, mean over queries.
        maps: ``(layers, Tq, 3)`` the same of each query, mean over steps and heads.
        memory: ``(layers, Tm)`` attention on each memory token in the last step.
        evicted: frames that were written to the memory.
        written: ``(layers, tokens, Tk)`` attention of memory tokens over the evicted ones; None without a write.
        gate: ``(tokens, 3)`` 10 %, 50 % and 90 % quantile over D of what a memory token keeps of itself; None without.
    """

    block: int
    tiers: Tensor
    maps: Tensor
    memory: Tensor
    evicted: range = range(0)
    written: Tensor | None = None
    gate: Tensor | None = None


@dataclass
class Watcher:
    """Follow a stream from here on; ``views`` has one entry a generated block.

    Args:
        sampler: a stream of batch 1 that replays no CUDA graphs, which hide what happens in them.

    Raises:
        ValueError: the stream is a batch, or replays graphs.
    """

    sampler: BlockSampler
    views: list[BlockView] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sampler.batch != 1 or self.sampler.graphs is not None:
            raise ValueError(f"watch a stream of batch 1 without CUDA graphs, got batch {self.sampler.batch}")
        self._steps = len(self.sampler.generator.timesteps)
        self._writings: list[tuple[int, Writing]] = []  # with the number of frames written
        self._readings: dict[tuple[int, int], Any] = {}
        self.sampler.cache = _WatchedCache(self.sampler.cache, self)  # type: ignore[assignment]  # stands in for it
        if isinstance(self.sampler.memory, StreamMemory):
            self.sampler.memory.module = _WatchedMemory(self.sampler.memory.module, self)  # type: ignore[assignment]

    def next_block(self) -> Tensor:
        """Generate a block ``(1, F, C, h, w)`` and take its view."""
        w = self.sampler.generator.config.window
        frame, block = self.sampler.frame, self.sampler.block
        self._readings, self._writings = {}, []
        latents = self.sampler.next_block()
        layers = range(len(self.sampler.cache.k))
        steps = [[self._readings[step, i] for i in layers] for step in range(self._steps)]
        shares = torch.stack([torch.stack([x.tiers for x in step]) for step in steps])  # (steps, layers, H, Tq, 3)
        memory = torch.stack([x.memory for x in steps[-1]])
        view = BlockView(block, shares.mean(3), shares.mean((0, 2)), memory)
        for count, writing in self._writings:
            gone, look = frame + w.frames_per_block - w.local_frames, writing.attention
            view.evicted = range(gone - count, gone)
            view.written = look[:, :: max(1, -(-look[0].numel() // _CELLS))]
            if writing.gate is not None:
                view.gate = writing.gate[0].quantile(torch.tensor([0.1, 0.5, 0.9]), dim=-1).T
        self.views.append(view)
        return latents

    def see_reading(self, layer: int, step: int, reading: Any) -> None:
        """Keep what a layer of a denoising call read."""
        if step < self._steps:  # the context pass comes after them
            self._readings[step, layer] = reading

    def see_writing(self, segments: Sequence[Segment], writing: Writing) -> None:
        """Keep what a write of ``segments`` read."""
        per = self.sampler.cache.tokens_per_frame
        self._writings.append((sum(k.shape[1] for k, _ in segments) // per, writing))


class _WatchedCache:
    """Stands in for a :class:`RingKV` and hands what it reads to a watcher."""

    def __init__(self, inner: RingKV, watcher: Watcher) -> None:
        self._inner, self._watcher = inner, watcher
        self._call: Call | None = None
        self._step = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor, Tensor],
        call: Call,
        memory: KV | None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        if layer == 0:
            self._step = self._step + 1 if call is self._call else 0
            self._call = call
        out = self._inner.attend(layer, q, k, v, norms, call, memory, output=output)
        if output:
            eps = self._inner.config.model.eps
            self._watcher.see_reading(
                layer, self._step, explain_reading(self._inner, layer, q, norms[0], call, memory, eps)
            )
        return out


class _WatchedMemory:
    """Stands in for an :class:`EvolvingMemory` and hands what its writes read to a watcher."""

    def __init__(self, inner: EvolvingMemory, watcher: Watcher) -> None:
        self._inner, self._watcher = inner, watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(
        self,
        state: Tensor,
        segments: Sequence[Segment],
        *,
        sink: Segment | None = None,
        q_rope: RopeTables | None = None,
        k_rope: Sequence[RopeTables] | None = None,
    ) -> Tensor:
        if not self._inner.config.frozen:
            self._watcher.see_writing(segments, explain_writing(self._inner, state, segments, sink, q_rope, k_rope))
        return self._inner.write(state, segments, sink=sink, q_rope=q_rope, k_rope=k_rope)
