"""One stream's side of the memory: when it is written, what is published, and its keys at the call's ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from echo_ext import frame_table, grid_table, rope_rotate
from echo_infinity.cache import KV, Call
from echo_infinity.config import EchoConfig, memory_grid
from echo_infinity.memory import EvolvingMemory
from echo_infinity.positions import grid_positions

_Version = tuple[int, range, bool]


class Evicting(Protocol):
    """What a write needs of a cache."""

    def evicted(self, call: Call) -> list[KV]: ...

    def held(self, frames: range) -> list[KV]: ...

    def sink(self) -> KV: ...


class Recall(Protocol):
    """What a stream keeps of the frames that left its window: :class:`StreamMemory`, or a policy's own."""

    frames: int  # memory frames that a call may read: they take that many temporal ids
    why_no_graph: str  # why blocks can't be replayed as CUDA graphs, or ""

    @property
    def active(self) -> bool: ...

    def prepare(self, cache: Evicting, call: Call) -> None: ...

    def publish(self) -> None: ...

    def read(self, call: Call) -> list[KV] | None: ...

    def rewrite(self, segments: list[KV], cache: Evicting) -> None: ...

    def detach(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, named: Mapping[str, Tensor]) -> None: ...


class StreamMemory:
    """State of the evolving memory in one stream, with the order of events the method fixes.

    ``prepare`` computes the write from the frames a block will overwrite, before its first call does so;
    ``publish`` makes it visible after that call; ``read`` gives each layer its keys and values.

    Args:
        module: the memory's weights.
        config: geometry.
        batch: ``B``.
        dtype: of the state; default the weights'.

    Source: docs/method.md section 4.
    """

    def __init__(
        self, module: EvolvingMemory, config: EchoConfig, batch: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        self.module = module
        self.config = config
        self.batch = batch
        self.frames = module.config.frames
        batched = module.config.write_every > 1
        self.why_no_graph = "write_every > 1: evictions are kept aside between blocks" if batched else ""
        device = next(module.parameters()).device
        m = module.config
        rows, columns = grid_positions(*memory_grid(m.tokens_per_frame, config.grid), *config.grid)
        self._grid = grid_table(rows, columns, m.head_dim, device=device)
        self._video_grid = grid_table(*grid_positions(*config.grid, *config.grid), m.head_dim, device=device)
        self._state_dtype = dtype
        self.gates: list[Tensor] | None = None  # a list here is given the gate of every write that follows
        self.reset()

    def reset(self) -> None:
        """Forget everything: the state is the learned start and inactive until the next write."""
        self.state: Tensor = self.module.start(self.batch, self._state_dtype)  # (G, B, M * T_m, D)
        self.writes = 0
        self.pending: list[KV] = []
        self._next: Tensor | None = None
        self._read: tuple[_Version, list[KV]] | None = None
        self._fixed: tuple[Tensor, list[KV]] | None = None  # the state's and the keys' and values' own addresses

    @property
    def active(self) -> bool:
        """Whether a write has been published."""
        return self.writes > 0

    def prepare(self, cache: Evicting, call: Call) -> None:
        """Compute the write of the frames that ``call`` pushes out, while their slots still hold them."""
        evicted = cache.evicted(call)
        self._next = None
        if not evicted:
            return
        every = self.module.config.write_every
        if every > 1:  # batched writes outlive the slots, so this option alone copies
            self.pending.append(_join(evicted))
            if len(self.pending) < every:
                return
            evicted, self.pending = [_join(self.pending)], []
        self._next = self._write(self.state, evicted, cache)

    def publish(self) -> None:
        """Make the prepared write visible to the next call; does nothing if there is none."""
        if self._next is None:
            return
        if self._fixed is not None and self.state is self._fixed[0]:
            self.state.copy_(self._next)
        else:
            self.state = self._next
        self._next = None
        self.writes += 1

    def rewrite(self, segments: list[KV], cache: Evicting) -> None:
        """Start over from the learned start with one write of ``segments`` (memory re-cache at a prompt switch)."""
        # Nothing changes before the write, which may run out of memory; captured graphs keep their addresses.
        self._next = self._write(self.module.start(self.batch, self._state_dtype), segments, cache)
        self.pending, self._read = [], None
        self.publish()

    def replace(self, state: Tensor) -> None:
        """Put another state ``(G, B, M * T_m, D)`` in place, as ablations do."""
        self.state, self._read = state, None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later block depends on, by name, between blocks."""
        named = {"state": self.state, "writes": torch.tensor(self.writes)}
        for i, (k, v) in enumerate(self.pending):
            named |= {f"pending.{i}.k": k, f"pending.{i}.v": v}
        return named

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on from copies of what :meth:`tensors` returned.

        Raises:
            ValueError: tensors are missing, or the state has another shape.
        """
        count = sum(name.startswith("pending.") for name in named) // 2
        pairs = [(f"pending.{i}.k", f"pending.{i}.v") for i in range(count)]
        if missing := [name for name in ("state", "writes", *sum(pairs, ())) if name not in named]:
            raise ValueError(f"a saved memory lacks {', '.join(missing)}")
        if named["state"].shape != self.state.shape:
            raise ValueError(f"saved memory is {tuple(named['state'].shape)}, this one {tuple(self.state.shape)}")
        own = self.state
        self.state = named["state"].to(own.device, own.dtype, copy=True)
        self.writes = int(named["writes"])
        self.pending = [(named[k].to(own.device, copy=True), named[v].to(own.device, copy=True)) for k, v in pairs]
        self._next = self._read = None

    def detach(self) -> None:
        """Cut the state's history: the boundary of truncated back-propagation."""
        # A copy: the state may still be the learned start itself, which the next training step changes.
        self.state, self._read = self.state.detach().clone(), None

    def read(self, call: Call) -> list[KV] | None:
        """Rotated keys and values ``(B, M * T_m, H, d)`` of every layer, or None where the call reads no memory."""
        if not self.active or not len(call.ids.memory):
            return None
        version = self._version(call)
        if self._read is None or self._read[0] != version:
            groups = self._project(call)
            if self._fixed is not None and self.state is self._fixed[0]:
                groups = _copy_into(self._fixed[1], groups)
            self._read = version, self._by_layer(groups)
        return self._read[1]

    def fix(self, call: Call) -> None:
        """From here on write state, keys and values where they lie, so that a captured graph finds them.

        Brings them up to date for ``call``; to be called before each replay, since a prompt switch or a loaded state
        may have put others in their place.
        """
        if self._fixed is None:
            self._fixed = self.state.clone(), [(k.clone(), v.clone()) for k, v in self._project(call)]
        if self.state is not self._fixed[0]:
            self._fixed[0].copy_(self.state)
            self.state, self._read = self._fixed[0], None
        if self._read is not None and self._read[1][0][0] is not self._fixed[1][0][0]:
            self._read = None
        self.read(call)

    def replayed(self, call: Call) -> None:
        """Count the write that a replayed graph did, and know its keys and values as read."""
        assert self._fixed is not None
        self.writes += call.slots.evicted.frames > 0
        self._read = self._version(call), self._by_layer(self._fixed[1])

    def bookmark(self) -> tuple[object, ...]:
        """What the host knows; with :meth:`back_to`, a capture that runs nothing leaves it as it was."""
        return self.state, self.writes, self._next, self._read

    def back_to(self, bookmark: tuple[object, ...]) -> None:
        """Restore what :meth:`bookmark` returned."""
        self.state, self.writes, self._next, self._read = bookmark  # type: ignore[assignment]

    def _version(self, call: Call) -> _Version:
        return self.writes, call.ids.memory, torch.is_grad_enabled()  # a read without gradient serves no training

    def _project(self, call: Call) -> list[KV]:
        keys, values = self.module.read(self.state)  # (G, B, M * T_m, H, d)
        table = frame_table(list(call.ids.memory), self.module.config.head_dim, device=keys.device)
        return [(rope_rotate(k, table, self._grid), v) for k, v in zip(keys, values, strict=True)]

    def _by_layer(self, groups: list[KV]) -> list[KV]:
        layers = self.config.model.layers
        return [groups[self.module.config.group_of(layer, layers)] for layer in range(layers)]

    def _write(self, state: Tensor, segments: list[KV], cache: Evicting) -> Tensor:
        m = self.module.config
        sink = cache.sink() if m.sink_anchor else None
        q_rope = k_rope = None
        if m.positions:
            q_rope = frame_table(list(range(m.frames)), m.head_dim, device=state.device), self._grid
            read = segments if sink is None else [sink, *segments]
            k_rope, first = [], 0
            for k, _ in read:
                count = k.shape[1] // len(self._video_grid)
                ids = list(range(first, first + count))
                k_rope.append((frame_table(ids, m.head_dim, device=state.device), self._video_grid))
                first += count
        if self.gates is not None and not m.residual:
            self.gates.append(self.module.gate(state, segments, sink=sink, q_rope=q_rope, k_rope=k_rope))
        return self.module.write(state, segments, sink=sink, q_rope=q_rope, k_rope=k_rope)


def _copy_into(fixed: list[KV], new: list[KV]) -> list[KV]:
    for (k, v), (new_k, new_v) in zip(fixed, new, strict=True):
        k.copy_(new_k)
        v.copy_(new_v)
    return fixed


def _join(segments: list[KV]) -> KV:
    return torch.cat([k for k, _ in segments], dim=1), torch.cat([v for _, v in segments], dim=1)


RecallFactory = Callable[[EvolvingMemory | None, EchoConfig, int, torch.dtype | None], Recall | None]


def keep_own(
    module: EvolvingMemory | None, config: EchoConfig, batch: int, dtype: torch.dtype | None = None
) -> StreamMemory | None:
    """Return a stream's side of the model's own memory, or None where it has none."""
    return None if module is None else StreamMemory(module, config, batch, dtype)
