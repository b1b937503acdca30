"""A memory tier without weights: every layer keeps keys and values made from its own frames that left the window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from echo_ext import frame_table, grid_table, rope_rotate
from echo_infinity.cache import KV, Call
from echo_infinity.config import EchoConfig
from echo_infinity.policies.policy import Policy
from echo_infinity.positions import grid_positions
from echo_infinity.recall import Evicting


class Layered(NamedTuple):
    """Keys (before rotation) and values of all layers, ``(layers, B, n, H, d)`` each."""

    k: Tensor
    v: Tensor

    def tokens(self, first: int, last: int | None = None) -> Layered:
        """Views of tokens ``first .. last - 1``."""
        return Layered(self.k[:, :, first:last], self.v[:, :, first:last])

    def then(self, other: Layered) -> Layered:
        """These tokens, then those of ``other``."""
        return Layered(torch.cat([self.k, other.k], dim=2), torch.cat([self.v, other.v], dim=2))


class TierPolicy(Policy):
    """A policy whose memory tier is a :class:`Tier`; as many frame-equivalents as a block has frames."""

    def _configure(self, config: EchoConfig) -> EchoConfig:
        w, block = config.window, config.window.frames_per_block
        if w.sink_frames % block or w.window_frames % block:
            raise ValueError(
                f"policy {self.name!r} needs sink_frames {w.sink_frames} and window_frames {w.window_frames} to be "
                f"multiples of frames_per_block {block}, so that a whole block leaves the window at a time"
            )
        if w.relative and w.window_frames + block > w.p_max:
            raise ValueError(
                f"policy {self.name!r}: window_frames {w.window_frames} + {block} memory frames exceed "
                f"p_max {w.p_max}: ids would overlap the sink"
            )
        return replace(config, memory=None)


class Tier(ABC):
    """One stream's tier, with the order of events of :class:`~echo_infinity.recall.StreamMemory`: a write is prepared
    from the frames that a block will overwrite and published after its first call.

    Args:
        config: geometry.
        batch: ``B``.
    """

    why_no_graph = "the policy's memory tier is not at a fixed address"

    def __init__(self, config: EchoConfig, batch: int) -> None:
        self.config, self.batch = config, batch
        self.frames = config.window.frames_per_block
        self.tokens_per_frame = config.tokens_per_frame
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: Layered | None = None
        self.writes = 0
        self._end = 0  # frames of the stream that the last prepared call reached
        self._next: Layered | None = None
        self._read: tuple[tuple[object, ...], list[KV]] | None = None

    @property
    def active(self) -> bool:
        """Whether a write has been published."""
        return self.state is not None

    @abstractmethod
    def fold(self, state: Layered | None, gone: Layered, frames: range) -> Layered:
        """Return the state after ``frames`` left the window, whose keys and values are ``gone``."""

    @abstractmethod
    def place(self, state: Layered, call: Call) -> tuple[Layered, list[float]]:
        """Return what ``call`` sees, whole frames of :meth:`grid`, and the temporal id of each."""

    def grid(self) -> tuple[int, int]:
        """Rows and columns of a kept frame's tokens."""
        return self.config.grid

    def prepare(self, cache: Evicting, call: Call) -> None:
        """Compute the write of the frames that ``call`` pushes out, while their slots still hold them."""
        w = self.config.window
        self._next, self._end = None, call.start + call.frames
        first = max(w.sink_frames, call.start - w.local_frames)
        if call.slots.evicted.frames:
            self._next = self._folded(self.state, cache, range(first, first + call.slots.evicted.frames))

    def publish(self) -> None:
        """Make the prepared write visible to the next call; does nothing if there is none."""
        if self._next is not None:
            self.state, self._next = self._next, None
            self.writes += 1

    def rewrite(self, segments: list[KV], cache: Evicting) -> None:
        """Start over with all local frames, oldest block first, as if they had left (memory re-cache at a switch)."""
        w, end, writes = self.config.window, self._end, self.writes
        state = None
        for first in range(max(w.sink_frames, end - w.local_frames), end, w.frames_per_block):
            state = self._folded(state, cache, range(first, first + w.frames_per_block))
        self.reset()
        self.state, self.writes, self._end = state, writes + 1, end

    def read(self, call: Call) -> list[KV] | None:
        """Rotated keys and values of every layer, or None where the call reads no memory."""
        if self.state is None or not len(call.ids.memory):
            return None
        version = self.writes, call.start, call.ids.memory, torch.is_grad_enabled()
        if self._read is None or self._read[0] != version:
            self._read = version, self._rotated(self.state, call)
        return self._read[1]

    def detach(self) -> None:
        """Cut the history: the boundary of truncated back-propagation."""
        if self.state is not None:
            self.state = Layered(*(x.detach() for x in self.state))
        self._read = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later block depends on, by name, between blocks."""
        named = {"writes": torch.tensor(self.writes), "end": torch.tensor(self._end)}
        return named if self.state is None else named | {"k": self.state.k, "v": self.state.v}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on from copies of what :meth:`tensors` returned.

        Raises:
            ValueError: tensors are missing, or of another model's shape.
        """
        if missing := [name for name in ("writes", "end") if name not in named] + (
            ["k and v"] if ("k" in named) != ("v" in named) else []
        ):
            raise ValueError(f"a saved memory lacks {', '.join(missing)}")
        m = self.config.model
        for x in (named[name] for name in ("k", "v") if name in named):
            if (*x.shape[:2], *x.shape[3:]) != (m.layers, self.batch, m.heads, m.head_dim):
                raise ValueError(
                    f"saved memory is {tuple(x.shape)}, this one ({m.layers}, {self.batch}, n, {m.heads}, {m.head_dim})"
                )
        self.reset()
        self.writes, self._end = int(named["writes"]), int(named["end"])
        if "k" in named:
            self.state = Layered(named["k"].clone(), named["v"].clone())

    def _folded(self, state: Layered | None, cache: Evicting, frames: range) -> Layered:
        held = cache.held(frames)
        wide = torch.promote_types(held[0][0].dtype, torch.float32)
        k, v = (torch.stack([pair[i] for pair in held]).to(wide) for i in (0, 1))
        rows, columns = grid_positions(*self.config.grid, *self.config.grid)
        back = frame_table([-f for f in frames], k.shape[-1], device=k.device)
        grid = grid_table([-r for r in rows], [-c for c in columns], k.shape[-1], device=k.device)
        neutral = rope_rotate(k.flatten(0, 1), back, grid).view(k.shape)
        return self.fold(state, Layered(neutral, v), frames)

    def _rotated(self, state: Layered, call: Call) -> list[KV]:
        shown, ids = self.place(state, call)
        rows, columns = grid_positions(*self.grid(), *self.config.grid)
        k = shown.k
        table = frame_table(ids, k.shape[-1], device=k.device)
        grid = grid_table(rows, columns, k.shape[-1], device=k.device)
        rotated = rope_rotate(k.flatten(0, 1), table, grid).view(k.shape)
        return list(zip(rotated, shown.v, strict=True))
