"""A block's calls as CUDA graphs: what changes from block to block lives in device tensors or picks the graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from echo_infinity.cache import Call
from echo_infinity.recall import StreamMemory

if TYPE_CHECKING:
    from echo_infinity.sampler import BlockSampler

_MOST_GRAPHS = 32  # a window and block without a common divisor could ask for one graph a ring slot


class Capture(Protocol):
    """Records what ``body`` does; returns a replay and the tensor that ``body`` returned, written by each replay."""

    def record(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory: they are replayed one after another."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle

    def record(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture ``body`` without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # another thread may decode
            out = body()
        self._pool = graph.pool()
        return graph.replay, out


class BlockGraphs:
    """Replay the blocks of one stream.

    Blocks whose plans share slots and relative ids do the same work on other numbers: noise, the angles of the frames'
    own ids, the text, the memory state. Those live in fixed tensors; slots and relative ids are the key of a graph.
    Once the window is full the keys repeat, every ``local_frames / gcd(local_frames, frames_per_block)`` blocks. A key
    is captured when it comes back, so that the blocks that fill the window, and kernels' first calls, run as they are.

    Args:
        sampler: the stream.
        capture: how a block is recorded; by default as a CUDA graph.
    """

    def __init__(self, sampler: BlockSampler, capture: Capture | None = None) -> None:
        self._sampler = sampler
        self._capture = CudaCapture() if capture is None else capture
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}
        self._fixed: _Fixed | None = None
        self.failure = ""  # why capture was given up
        self.replays = 0

    def why_not(self, call: Call) -> str:
        """The reason this block runs call by call, or "" if it is replayed."""
        memory = self._sampler.memory
        if self.failure:
            return self.failure
        if memory is not None and memory.why_no_graph:
            return memory.why_no_graph
        if not self._sampler.generator.config.window.relative:
            return "absolute ids: every block's differ"
        key = self._key(call)
        if key not in self._seen:
            self._seen.add(key)
            return "the first block with these slots and ids"
        if key not in self._graphs and len(self._graphs) >= _MOST_GRAPHS:
            return f"{_MOST_GRAPHS} graphs are captured already"
        return ""

    def run(self, call: Call) -> Tensor | None:
        """Replay the block of ``call``, capturing it first where that is still to do.

        Returns:
            Clean latents ``(B, F, C, h, w)``, or None if capture failed: a warning says why, and the stream goes on
            call by call.
        """
        if self._fixed is None:
            self._fixed = _Fixed(self._sampler, call)
        self._fixed.fill(call)
        key = self._key(call)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture.record(lambda: self._fixed_calls(call))
            except RuntimeError as error:
                self.failure = f"capture failed: {error}"
                warnings.warn(f"CUDA graphs are off for this stream, {self.failure}", RuntimeWarning, stacklevel=2)
                return None
        replay, out = self._graphs[key]
        replay()
        self.replays += 1
        if isinstance(self._sampler.memory, StreamMemory):
            self._sampler.memory.replayed(call)
        return out.clone()

    def _key(self, call: Call) -> Hashable:
        memory = self._sampler.memory
        return call.frames, call.slots, call.ids, call.shift is None, memory is not None and memory.active

    def _fixed_calls(self, call: Call) -> Tensor:
        """The block on fixed tensors, leaving the host's counters as they were: a capture runs nothing."""
        assert self._fixed is not None
        memory, fixed = self._sampler.memory, self._fixed
        before = memory.bookmark() if isinstance(memory, StreamMemory) else None
        try:
            return self._sampler.run_calls(fixed.call(call), lambda step: fixed.noise[step])
        finally:
            if isinstance(memory, StreamMemory) and before is not None:
                memory.back_to(before)


class _Fixed:
    """Tensors that keep their addresses from block to block."""

    def __init__(self, sampler: BlockSampler, call: Call) -> None:
        self._sampler = sampler
        self._frame_table = torch.empty_like(call.frame_table)
        self._shift: Tensor | None = None
        self._text = [(k.clone(), v.clone()) for k, v in sampler.text]
        self.noise = [torch.empty_like(sampler.draw(step)) for step in range(sampler.draws)]
        if isinstance(sampler.memory, StreamMemory):
            sampler.memory.fix(call)

    def call(self, call: Call) -> Call:
        """``call`` with its changing tensors replaced by the fixed ones."""
        return replace(call, frame_table=self._frame_table, shift=None if call.shift is None else self._shift)

    def fill(self, call: Call) -> None:
        """Bring everything that the block reads to its place."""
        self._frame_table.copy_(call.frame_table)
        if call.shift is not None:
            self._shift = torch.empty_like(call.shift) if self._shift is None else self._shift
            self._shift.copy_(call.shift)
        for step, noise in enumerate(self.noise):
            noise.copy_(self._sampler.draw(step))
        if self._sampler.text is not self._text:  # the prompt has changed
            for own, new in zip(self._text, self._sampler.text, strict=True):
                own[0].copy_(new[0])
                own[1].copy_(new[1])
            self._sampler.text = self._text
        if isinstance(self._sampler.memory, StreamMemory):
            self._sampler.memory.fix(call)
