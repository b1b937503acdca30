"""The K/V cache of one stream: sink and ring in one buffer a layer, written in place, never shifted or copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from echo_ext import Evicted, frame_shift, frame_table, grid_table, ring_append, ring_evict, stream_attention
from echo_infinity.config import EchoConfig
from echo_infinity.positions import Ids, absolute_ids, relative_ids

KV = tuple[Tensor, Tensor]


class Slots(NamedTuple):
    """Where the frames of a call go and what they push out; plain ints."""

    write: tuple[int, ...]  # slot of each frame: sink slots first, then the ring
    evicted: Evicted  # ring slots (counted from the first ring slot) about to be overwritten
    sink: int  # sink frames cached, the call's own included
    local: int  # local frames cached, the call's own included


def plan_slots(start: int, frames: int, sink_frames: int, local_frames: int) -> Slots:
    """Assign cache slots to frames ``start .. start + frames - 1``; every frame is in exactly one tier.

    Raises:
        ValueError: the call is larger than the ring and its sink frames.

    Source: docs/method.md section 2.
    """
    own_local = start + frames - max(start, sink_frames)
    if frames < 1 or own_local > local_frames:
        raise ValueError(f"{frames} frames from {start} don't fit {sink_frames} sink and {local_frames} local slots")
    write = tuple(
        f if f < sink_frames else sink_frames + (f - sink_frames) % local_frames for f in range(start, start + frames)
    )
    first_held = max(sink_frames, start - local_frames)
    first_kept = max(sink_frames, start + frames - local_frames)
    evicted = Evicted((first_held - sink_frames) % local_frames, first_kept - first_held, local_frames)
    end = start + frames
    return Slots(write, evicted, min(end, sink_frames), min(max(0, end - sink_frames), local_frames))


@dataclass(frozen=True)
class Call:
    """One pass of the model over a block: its place in the stream, shared by all layers and denoising steps."""

    start: int
    frames: int
    ids: Ids
    slots: Slots
    slot_index: Tensor  # (1, F) int64
    frame_table: Tensor  # (1, F, n_t, 2) angles of absolute ids
    key_frame_table: Tensor | None  # where keys go to slots of another id (re-cached sink)
    shift: Tensor | None  # (1, n_t, 2) absolute -> relative; None while they agree
    grid_table: Tensor  # (T_f, n_s, 2)


class Geometry:
    """Tables and ids that depend on the configuration and the device only; makes the :class:`Call` of a block."""

    def __init__(self, config: EchoConfig, device: torch.device | str | None = None) -> None:
        self.config = config
        self.device = device
        self.head_dim = config.model.head_dim
        rows, columns = config.grid
        grid_rows = [r for r in range(rows) for _ in range(columns)]
        self.grid = grid_table(grid_rows, list(range(columns)) * rows, self.head_dim, device=device)

    def call(self, start: int, frames: int, *, memory_frames: int = 0, sink_ids: bool = True) -> Call:
        """Plan the pass over frames ``start .. start + frames - 1``.

        Args:
            start: first frame's number in the stream.
            frames: frames in the call.
            memory_frames: frame-equivalents of memory the call may read.
            sink_ids: False plans a full re-cache past the window, whose first frames go to the sink's slots and ids.
        """
        w = self.config.window
        if sink_ids:
            slots = plan_slots(start, frames, w.sink_frames, w.local_frames)
        else:
            local = plan_slots(start + w.sink_frames, frames - w.sink_frames, w.sink_frames, w.local_frames)
            slots = local._replace(write=(*range(w.sink_frames), *local.write), sink=w.sink_frames)
        absolute = range(start, start + frames)
        key_table = shift = None
        if w.relative:
            ids = relative_ids(
                start,
                frames,
                slots.local,
                memory_frames=memory_frames,
                sink_frames=slots.sink,
                p_max=w.p_max,
                frames_per_block=w.frames_per_block,
            )
            if not sink_ids:
                key_ids = [*range(w.sink_frames), *absolute[w.sink_frames :]]
                key_table = frame_table(key_ids, self.head_dim, device=self.device)
            if ids.query[0] != start:
                shift = frame_shift(ids.query[0], start, self.head_dim, device=self.device)
        else:
            ids = absolute_ids(start, frames, slots.local, memory_frames=memory_frames, sink_frames=slots.sink)
        return Call(
            start=start,
            frames=frames,
            ids=ids,
            slots=slots,
            slot_index=torch.tensor([slots.write]).to(self.device, non_blocking=True),
            frame_table=frame_table(list(absolute), self.head_dim, device=self.device),
            key_frame_table=key_table,
            shift=shift,
            grid_table=self.grid,
        )


class RingKV:
    """Keys and values of one stream (or a batch of streams in step), constant in size for ever.

    One buffer of ``sink + local`` frame slots a layer. Frame ``f`` lives in slot ``f`` (sink) or
    ``sink + (f - sink) % local``; a key is rotated once, by its own frame number, when it is written.

    Args:
        config: geometry; sets slots, layers, heads.
        batch: ``B``.
        dtype: of keys and values.
        device: where the buffers live.
        full_layers: layers to make buffers for; default all.
        heads: of the buffers; default the model's.

    Source: docs/method.md sections 2 and 3.
    """

    def __init__(
        self,
        config: EchoConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        full_layers: int | None = None,
        heads: int | None = None,
    ) -> None:
        m, w = config.model, config.window
        self.config = config
        self.tokens_per_frame = config.tokens_per_frame
        shape = (batch, w.window_frames * self.tokens_per_frame, heads or m.heads, m.head_dim)

        def buffers(count: int) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]

        layers = m.layers if full_layers is None else full_layers
        self.k, self.v = buffers(layers), buffers(layers)
        # Memory writes read the last layer's keys before rotation; absolute mode hands them over rotated.
        self.raw = buffers(1)[0] if config.memory is not None and w.relative else None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        call: Call,
        memory: KV | None,
        *,
        output: bool = True,
    ) -> Tensor | None:
        """Append a block's K/V to ``layer`` and attend over sink, memory and local frames.

        Args:
            layer: index of the transformer layer.
            q: ``(B, T, H, d)`` projected queries; ``k`` and ``v`` likewise.
            norms: ``(D,)`` scales of the query and key norms; None where ``q`` and ``k`` are normalised already.
            call: plan of the block.
            memory: rotated memory keys and values ``(B, M * T_m, H, d)``, or None.
            output: False writes K/V and returns None (last layer of a context pass).

        Returns:
            ``(B, T, H, d)``.
        """
        last = layer == len(self.k) - 1
        q = ring_append(
            q,
            k,
            v,
            q_weight=norms[0],
            k_weight=norms[1],
            frame_table=call.frame_table,
            key_frame_table=call.key_frame_table,
            grid_table=call.grid_table,
            slots=call.slot_index,
            ring_k=self.k[layer],
            ring_v=self.v[layer],
            ring_raw=self.raw if last else None,
            eps=self.config.model.eps,
        )
        if not output:
            return None
        split, end = self._sink_end(call), self._ring_end(call)
        ring_k, ring_v = self.k[layer], self.v[layer]
        if call.shift is None:  # one frame of reference: sink and ring are one run of slots
            split = 0
        sink = (ring_k[:, :split], ring_v[:, :split]) if split else None
        ring = (ring_k[:, split:end], ring_v[:, split:end])
        narrow = None if memory is None else (memory[0].to(q.dtype), memory[1].to(q.dtype))
        return stream_attention(q, sink=sink, memory=narrow, ring=ring, shift=call.shift)

    def evicted(self, call: Call) -> list[KV]:
        """Views of the last layer's K (before rotation where ids are relative) and V that ``call`` will overwrite."""
        k, v = self._ring(self.raw if self.raw is not None else self.k[-1]), self._ring(self.v[-1])
        first, count, _ = call.slots.evicted
        return ring_evict(k, v, first, count, self.tokens_per_frame)

    def held(self, frames: range) -> list[KV]:
        """Every layer's K (rotated by absolute ids) and V of ``frames``, which the cache must hold; copies."""
        w, t = self.config.window, self.tokens_per_frame
        slots = [f if f < w.sink_frames else w.sink_frames + (f - w.sink_frames) % w.local_frames for f in frames]
        spans = [slice(slot * t, (slot + 1) * t) for slot in slots]

        def pick(x: Tensor) -> Tensor:
            return torch.cat([x[:, span] for span in spans], dim=1)

        return [(pick(k), pick(v)) for k, v in map(self._whole_layer, range(len(self.k)))]

    def _whole_layer(self, layer: int) -> KV:
        """A layer's K and V as they are attended to."""
        return self.k[layer], self.v[layer]

    def local(self, start: int) -> list[KV]:
        """Last layer's K and V of all local frames held before frame ``start``, oldest first: views."""
        w = self.config.window
        count = min(max(0, start - w.sink_frames), w.local_frames)
        first = (max(w.sink_frames, start - w.local_frames) - w.sink_frames) % w.local_frames
        k, v = self._ring(self.raw if self.raw is not None else self.k[-1]), self._ring(self.v[-1])
        return ring_evict(k, v, first, count, self.tokens_per_frame)

    def sink(self) -> KV:
        """Last layer's K (before rotation where ids are relative) and V of the sink frames: views."""
        end = self.config.window.sink_frames * self.tokens_per_frame
        k = self.raw if self.raw is not None else self.k[-1]
        return k[:, :end], self.v[-1][:, :end]

    def copy_sink(self) -> list[Tensor]:
        """Clone every layer's sink slots, to put them back after a re-cache."""
        end = self.config.window.sink_frames * self.tokens_per_frame
        return [x[:, :end].clone() for x in self._all()]

    def restore_sink(self, saved: list[Tensor]) -> None:
        """Write back what :meth:`copy_sink` returned."""
        for x, old in zip(self._all(), saved, strict=True):
            x[:, : old.shape[1]] = old

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name, for saving and forking."""
        named = {f"k.{i}": x for i, x in enumerate(self.k)} | {f"v.{i}": x for i, x in enumerate(self.v)}
        return named if self.raw is None else named | {"raw": self.raw}

    def _all(self) -> list[Tensor]:
        return list(self.tensors().values())

    def _ring(self, x: Tensor) -> Tensor:
        return x[:, self.config.window.sink_frames * self.tokens_per_frame :]

    def _sink_end(self, call: Call) -> int:
        return call.slots.sink * self.tokens_per_frame

    def _ring_end(self, call: Call) -> int:
        return (call.slots.sink + call.slots.local) * self.tokens_per_frame
