"""The streaming loop as published, waste by waste: the same weights, linears and attention call as the engine's.

Every waste is a switch. With none on, the loop is the engine's; each one adds what the published inference code does
in its place and nothing slower than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.config import EchoConfig, memory_grid
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory
from echo_infinity.noise import counter_noise
from echo_infinity.positions import grid_positions
from echo_infinity.recall import StreamMemory
from echo_infinity.sampler import BlockSampler
from torch import Tensor

from echo_ext import ring_append, stream_attention
from echo_ext.ring import width_norm
from echo_ext.rope import axis_pairs

WASTES = {
    "clone": "clone each layer's whole K and V cache in every call, and write to clone and cache",
    "shift": "shift the window by copying when frames leave it",
    "rope": "rotate all cached keys again in every call of every layer, float64 complex",
    "concat": "concatenate sink, memory and local frames into fresh tensors",
    "reproject": "project the memory's K and V again in every call",
    "indices": "read cache indices back from the device",
    "video": "allocate noise and output for the whole video up front",
    "embeddings": "embed text and timestep again in every call",
    "context": "run the last layer and the head of the context pass to their end",
}


class NaiveSampler(BlockSampler):
    """A :class:`BlockSampler` that wastes what ``wastes`` names.

    Args:
        generator: weights shared with the engine; relative ids.
        embeddings: ``(B, n, text_width)`` prompt embeddings.
        wastes: names from :data:`WASTES`.
        video_blocks: length of the video that ``"video"`` allocates.
        seed: of the noise; the same draws as the engine's.

    Raises:
        ValueError: an unknown waste, or a generator with absolute ids.

    Source: docs/method.md section 9.
    """

    def __init__(
        self, generator: Generator, embeddings: Tensor, wastes: Sequence[str], *, video_blocks: int, seed: int = 0
    ) -> None:
        if unknown := set(wastes) - set(WASTES):
            raise ValueError(f"unknown wastes {sorted(unknown)}; known: {', '.join(WASTES)}")
        if not generator.config.window.relative:
            raise ValueError("the naive loop follows the relative recipe; the generator has absolute ids")
        self.wastes, self._embeddings = frozenset(wastes), embeddings
        super().__init__(generator, generator.model.encode_text(embeddings), counter_noise(seed), graphs=False)
        if self.wastes:
            rope = ComplexRope(generator.config, generator.device)
            self.cache = NaiveKV(generator.config, rope, self.wastes, generator.dtype, generator.device)
            if generator.memory is not None:
                self.memory = NaiveMemory(generator.memory, generator.config, rope, self.wastes)
        if "video" in self.wastes:
            starts = [self.noise(block, 0, self._shape) for block in range(video_blocks)]
            self._starts = torch.stack(starts).to(generator.device)
            frames = video_blocks * self._shape[1]
            self.video = torch.zeros(self._shape[0], frames, *self._shape[2:], device=generator.device)

    def next_block(self) -> Tensor:
        """Denoise the next block; with ``"video"``, into the video."""
        first = self.frame
        block = super().next_block()
        if "video" in self.wastes:
            self.video[:, first : self.frame] = block
        return block

    def draw(self, step: int) -> Tensor:
        return self._starts[self.block] if "video" in self.wastes and step == 0 else super().draw(step)

    def _flow(self, x: Tensor, t: float, call: Call, *, output: bool = True) -> Tensor | None:
        g = self.generator
        level = g.level(t)
        if "embeddings" in self.wastes:  # the published code, too, keeps the text's K and V of every layer
            padding = g.config.model.text_tokens - self._embeddings.shape[1]
            g.model.text_embedding(torch.nn.functional.pad(self._embeddings, (0, 0, 0, padding)).to(g.dtype))
            level = g.model.condition(torch.full((self.batch, call.frames), t, device=g.device))
        memory = None if self.memory is None else self.memory.read(call)
        whole = output or "context" in self.wastes
        flow = g.model(x, level, self.text, self.cache, call, memory, output=whole)
        return flow.to(x.dtype) if output else None


class ComplexRope:
    """3-D rotation in float64 complex arithmetic, from a table of the pretrained range as the published code holds.

    Args:
        config: geometry.
        device: of the table.
    """

    def __init__(self, config: EchoConfig, device: torch.device) -> None:
        self._pairs, self._device = axis_pairs(config.model.head_dim), device
        self._frames = _angles(range(config.window.p_max), self._pairs[0]).to(device)  # (p_max, n_t)
        self.grid = self._grid(*config.grid, config)
        if config.memory is not None:
            self.memory_grid = self._grid(*memory_grid(config.memory.tokens_per_frame, config.grid), config)

    def __call__(self, x: Tensor, ids: Sequence[int], grid: Tensor) -> Tensor:
        """Rotate ``x`` ``(B, F * T_f, H, d)`` by the frames' ``ids`` and the tokens' ``grid`` ``(T_f, n_s)``."""
        frame = self._frames[list(ids)][:, None].expand(-1, len(grid), -1)
        angles = torch.cat([frame, grid.expand(len(ids), -1, -1)], dim=-1).flatten(0, 1)[:, None]  # (T, 1, d/2)
        rows = []
        for row in x:  # sample by sample, tokens past the tables' end joined on: there are none, the copy is made
            turned = torch.view_as_complex(row.double().unflatten(-1, (-1, 2))) * angles
            rows.append(torch.cat([torch.view_as_real(turned).flatten(-2), row[len(angles) :]]))
        return torch.stack(rows).to(x.dtype)

    def _grid(self, rows: int, columns: int, config: EchoConfig) -> Tensor:
        row, column = grid_positions(rows, columns, *config.grid)
        grid = torch.cat([_angles(row, self._pairs[1]), _angles(column, self._pairs[2])], dim=-1)  # (T_f, n_s)
        return grid.to(self._device)


class NaiveKV(RingKV):
    """A :class:`RingKV` with the wastes of a cache; same interface, same linears, same attention call."""

    def __init__(
        self, config: EchoConfig, rope: ComplexRope, wastes: frozenset[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, 1, dtype, device)
        self._rope, self._wastes = rope, wastes
        if "rope" in wastes:
            self.raw = None  # keys are cached as they are before rotation
        self._seen: list[int | Tensor] = [0] * len(self.k)  # frames each layer has seen
        if "indices" in wastes:
            self._seen = [torch.zeros((), dtype=torch.int64, device=device) for _ in self.k]

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
        """Append a block's K/V and attend; see :meth:`RingKV.attend`."""
        kept, leaving = (self.k[layer], self.v[layer]), self._leaving(layer, call)
        if "clone" in self._wastes:  # attended to, while the cache itself is brought up to date as well
            self.k[layer], self.v[layer] = kept[0].clone(), kept[1].clone()
        raw = [self.raw] if layer == len(self.k) - 1 and self.raw is not None else []
        self._shift([self.k[layer], self.v[layer], *raw], leaving)
        q = self._append(layer, q, k, v, norms, call)
        keys, values = self.k[layer], self.v[layer]
        if "clone" in self._wastes:
            self._shift(kept, leaving)
            self._copy_call(kept, (keys, values), call)
            self.k[layer], self.v[layer] = kept
        if not output:
            return None
        split, end = self._sink_end(call), self._ring_end(call)
        if "indices" in self._wastes:
            end = min(int(self._seen[layer]), self.config.window.window_frames) * self.tokens_per_frame
        keys, values = keys[:, :end], values[:, :end]
        shift = call.shift
        if "rope" in self._wastes:
            q = self._rope(q, call.ids.query, self._rope.grid)
            keys, shift = self._rope(keys, self._held_ids(call), self._rope.grid), None
        if "concat" in self._wastes:
            return self._joined(q, keys, values, split, memory, shift)
        if shift is None:
            split = 0
        sink = (keys[:, :split], values[:, :split]) if split else None
        return stream_attention(q, sink=sink, memory=memory, ring=(keys[:, split:], values[:, split:]), shift=shift)

    def evicted(self, call: Call) -> list[KV]:
        """Last layer's K before rotation and V of the frames ``call`` will push out."""
        if "shift" not in self._wastes:
            return super().evicted(call)
        first = self.config.window.sink_frames * self.tokens_per_frame
        last = first + call.slots.evicted.frames * self.tokens_per_frame
        k = self.k[-1] if self.raw is None else self.raw
        return [(k[:, first:last], self.v[-1][:, first:last])] if last > first else []

    def _leaving(self, layer: int, call: Call) -> int:
        """Frames that leave the window in this call of this layer: in a block's first call; marks the call as seen."""
        end = call.start + call.frames
        first_call = int(self._seen[layer]) < end  # a read from the device where the index is a tensor
        if "indices" in self._wastes:
            self._seen[layer].fill_(end)
        else:
            self._seen[layer] = end
        return call.slots.evicted.frames if first_call else 0

    def _shift(self, buffers: Sequence[Tensor], frames: int) -> None:
        """Copy the window ``frames`` frames down, past the sink, where it shifts."""
        if "shift" not in self._wastes or not frames:
            return
        first = self.config.window.sink_frames * self.tokens_per_frame
        moved = frames * self.tokens_per_frame
        for x in buffers:
            x[:, first:-moved] = x[:, first + moved :].clone()

    def _copy_call(self, to: KV, source: KV, call: Call) -> None:
        """Copy the call's frames from a clone into the cache."""
        for slot in self._slots(call)[0].tolist():
            frame = slice(slot * self.tokens_per_frame, (slot + 1) * self.tokens_per_frame)
            for cache, new in zip(to, source, strict=True):
                cache[:, frame] = new[:, frame]

    def _slots(self, call: Call) -> Tensor:
        """Slots of the call's frames: the ring's, or the last ones of a window in frame order."""
        if "shift" not in self._wastes:
            return call.slot_index
        held = call.slots.sink + call.slots.local
        return torch.arange(held - call.frames, held, device=call.slot_index.device)[None]

    def _held_ids(self, call: Call) -> list[int]:
        """Relative id of the frame in every filled slot."""
        sink, local = list(call.ids.sink), list(call.ids.local)
        if "shift" in self._wastes or not local:
            return sink + local
        ring = self.config.window.local_frames
        newest = call.start + call.frames - 1 - self.config.window.sink_frames
        by_slot = {(newest - age) % ring: local[-1 - age] for age in range(len(local))}
        return sink + [by_slot[slot] for slot in range(len(local))]

    def _append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], call: Call) -> Tensor:
        slots, eps = self._slots(call), self.config.model.eps
        if "rope" not in self._wastes:
            return ring_append(
                q,
                k,
                v,
                q_weight=norms[0],
                k_weight=norms[1],
                frame_table=call.frame_table,
                grid_table=call.grid_table,
                slots=slots,
                ring_k=self.k[layer],
                ring_v=self.v[layer],
                ring_raw=self.raw if layer == len(self.k) - 1 else None,
                eps=eps,
            )
        frames = (-1, self.tokens_per_frame)
        for cache, new in ((self.k[layer], width_norm(k, norms[1], eps)), (self.v[layer], v)):
            cache.unflatten(1, frames).index_copy_(1, slots[0], new.unflatten(1, frames))
        return width_norm(q, norms[0], eps)

    @staticmethod
    def _joined(q: Tensor, k: Tensor, v: Tensor, split: int, memory: KV | None, shift: Tensor | None) -> Tensor:
        """Attention over fresh tensors; where the tiers need two turns of the query, over their two parts."""
        tiers = [(k[:, :split], v[:, :split]), *([memory] if memory is not None else []), (k[:, split:], v[:, split:])]
        k, v = (torch.cat(parts, dim=1) for parts in zip(*tiers, strict=True))
        if shift is None:
            return stream_attention(q, ring=(k, v))
        fixed = k.shape[1] - tiers[-1][0].shape[1]
        return stream_attention(q, sink=(k[:, :fixed], v[:, :fixed]), ring=(k[:, fixed:], v[:, fixed:]), shift=shift)


class NaiveMemory(StreamMemory):
    """A :class:`StreamMemory` that projects its keys in every call, or rotates them anew for every layer."""

    def __init__(self, module: EvolvingMemory, config: EchoConfig, rope: ComplexRope, wastes: frozenset[str]) -> None:
        super().__init__(module, config)
        self._rope, self._wastes = rope, wastes
        self._raw: tuple[int, tuple[Tensor, Tensor]] | None = None

    def read(self, call: Call) -> Sequence[KV] | None:
        """Keys and values of every layer; rotated when a layer asks for them where that is wasted."""
        if not self._wastes & {"rope", "reproject"}:
            return super().read(call)
        if not self.active or not len(call.ids.memory):
            return None
        if "rope" not in self._wastes:
            return self._by_layer(self._project(call))
        if "reproject" in self._wastes or self._raw is None or self._raw[0] != self.writes:
            self._raw = self.writes, self.module.read(self.state)
        return _PerLayer(self, call)

    def layer(self, layer: int, call: Call) -> KV:
        """Keys, rotated now, and values of one layer."""
        assert self._raw is not None
        group = self.module.config.group_of(layer, self.config.model.layers)
        k, v = (x[group] for x in self._raw[1])
        return self._rope(k, call.ids.memory, self._rope.memory_grid), v


class _PerLayer(Sequence[KV]):
    """Memory keys and values, layer by layer on demand."""

    def __init__(self, memory: NaiveMemory, call: Call) -> None:
        self._memory, self._call = memory, call

    def __len__(self) -> int:
        return self._memory.config.model.layers

    def __getitem__(self, layer: int) -> KV:  # type: ignore[override]
        return self._memory.layer(layer, self._call)


def _angles(positions: Sequence[float], pairs: int) -> Tensor:
    """``exp(i * position * 10000^(-j / pairs))`` as complex128, ``(positions, pairs)``."""
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.tensor(list(positions), dtype=torch.float64)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)
