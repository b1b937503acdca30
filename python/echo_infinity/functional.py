"""The cache's functional twin for training: nothing is overwritten, so gradients can pass through it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as nnf

from echo_ext import rope_rotate, stream_attention
from echo_ext.attention import shift_queries
from echo_ext.ring import width_norm
from echo_infinity.cache import KV, Call
from echo_infinity.config import EchoConfig


class FunctionalKV:
    """Same window, same ids and same results as :class:`~echo_infinity.cache.RingKV`, by plain concatenation.

    Args:
        config: geometry; sets the window and the number of layers.

    Source: docs/method.md sections 2 and 7.
    """

    def __init__(self, config: EchoConfig) -> None:
        self.config = config
        self.tokens_per_frame = config.tokens_per_frame
        self._held: list[_Held | None] = [None] * config.model.layers

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
        """Append a block's K/V to ``layer`` and attend; see :meth:`echo_infinity.cache.RingKV.attend`."""
        eps = self.config.model.eps
        k = width_norm(k, norms[1], eps)
        raw = k if layer == len(self._held) - 1 else None  # memory writes read the last layer only
        rotated = rope_rotate(k, call.frame_table, call.grid_table)
        new = _Held(range(call.start, call.start + call.frames), rotated, v, raw)
        old = self._held[layer]
        kept = [] if old is None else self._kept(old, call)
        held = self._held[layer] = _join([*kept, new])
        if not output:
            return None
        q = rope_rotate(width_norm(q, norms[0], eps), call.frame_table, call.grid_table)
        return self._attention(q, held, call, memory)

    def evicted(self, call: Call) -> list[KV]:
        """Last layer's K and V of the frames that leave the window in ``call``."""
        w, held = self.config.window, self._held[-1]
        if held is None:
            return []
        first = max(w.sink_frames, call.start - w.local_frames)
        last = first + call.slots.evicted.frames
        return [self._slice(held, first, last)] if last > first else []

    def held(self, frames: range) -> list[KV]:
        """Every layer's K (rotated by absolute ids) and V of ``frames``, which the cache must hold."""
        pairs = []
        for layer in self._held:
            assert layer is not None
            first, t = layer.frames.index(frames.start), self.tokens_per_frame
            part = layer.part(first, first + len(frames), t)
            pairs.append((part.k, part.v))
        return pairs

    def sink(self) -> KV:
        """Last layer's K and V of the sink frames."""
        held = self._held[-1]
        if held is None:
            raise ValueError("the sink is empty: no block has been cached")
        return self._slice(held, 0, self.config.window.sink_frames)

    def detach(self) -> None:
        """Cut the history of everything held: the boundary of truncated back-propagation."""
        for held in self._held:
            if held is not None:
                held.k, held.v = held.k.detach(), held.v.detach()
                held.raw = None if held.raw is None else held.raw.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later block depends on, by name."""
        named: dict[str, Tensor] = {}
        for i, held in enumerate(self._held):
            if held is not None:
                named |= {f"frames.{i}": torch.tensor(held.frames), f"k.{i}": held.k, f"v.{i}": held.v}
                named |= {} if held.raw is None else {f"raw.{i}": held.raw}
        return named

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` returned."""
        self._held = [
            _Held(named[f"frames.{i}"].tolist(), named[f"k.{i}"], named[f"v.{i}"], named.get(f"raw.{i}"))
            if f"k.{i}" in named
            else None
            for i in range(len(self._held))
        ]

    def _slice(self, held: _Held, first: int, last: int) -> KV:
        index = [i for i, f in enumerate(held.frames) if first <= f < last]
        span = slice(index[0] * self.tokens_per_frame, (index[-1] + 1) * self.tokens_per_frame)
        k = held.raw if self.config.window.relative else held.k
        assert k is not None
        return k[:, span], held.v[:, span]

    def _kept(self, old: _Held, call: Call) -> list[_Held]:
        """Runs of frames of ``old`` that stay: the sink, and the local frames before the call."""
        w, t = self.config.window, self.tokens_per_frame
        oldest = call.start + call.frames - w.local_frames
        keep = [f < call.start and (f < w.sink_frames or f >= oldest) for f in old.frames]
        if all(keep):
            return [old]
        edges = [i for i, (a, b) in enumerate(zip([False, *keep], [*keep, False], strict=True)) if a != b]
        return [old.part(first, last, t) for first, last in zip(edges[::2], edges[1::2], strict=True)]

    def _attention(self, q: Tensor, held: _Held, call: Call, memory: KV | None) -> Tensor:
        split = 0 if call.shift is None else call.slots.sink * self.tokens_per_frame
        if not torch.is_grad_enabled():
            sink = (held.k[:, :split], held.v[:, :split]) if split else None
            narrow = None if memory is None else (memory[0].to(q.dtype), memory[1].to(q.dtype))
            ring = (held.k[:, split:], held.v[:, split:])
            return stream_attention(q, sink=sink, memory=narrow, ring=ring, shift=call.shift)
        keys, values = [held.k[:, split:]], [held.v[:, split:]]
        fixed = [(held.k[:, :split], held.v[:, :split])] if split else []
        if memory is not None:
            fixed.append(memory)
        # Turning sink and memory keys the other way equals turning the query: scores depend on differences.
        back = None if call.shift is None else call.shift * call.shift.new_tensor([1.0, -1.0])
        for k, v in fixed:
            keys.append(k if back is None else shift_queries(k, back))
            values.append(v)
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = torch.cat([x.to(wide) for x in keys], dim=1), torch.cat([x.to(wide) for x in values], dim=1)
        # The CPU's bfloat16 attention backward is six times slower than float32's.
        with torch.autocast(q.device.type, enabled=False):
            heads_first = [x.transpose(1, 2) for x in (q.to(wide), k, v)]
            out = nnf.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])
        return out.transpose(1, 2).to(q.dtype)


class _Held:
    """Frames a layer holds: ``k`` rotated, ``v``, ``raw`` keys before rotation; each ``(B, n * T_f, H, d)``."""

    def __init__(self, frames: range | list[int], k: Tensor, v: Tensor, raw: Tensor | None) -> None:
        self.frames, self.k, self.v, self.raw = list(frames), k, v, raw

    def part(self, first: int, last: int, tokens_per_frame: int) -> _Held:
        """Views of the frames at places ``first .. last - 1``."""
        span = slice(first * tokens_per_frame, last * tokens_per_frame)
        raw = None if self.raw is None else self.raw[:, span]
        return _Held(self.frames[first:last], self.k[:, span], self.v[:, span], raw)


def _join(parts: list[_Held]) -> _Held:
    if len(parts) == 1:
        return parts[0]
    frames = [f for part in parts for f in part.frames]
    raws = [part.raw for part in parts if part.raw is not None]
    k, v = torch.cat([part.k for part in parts], dim=1), torch.cat([part.v for part in parts], dim=1)
    return _Held(frames, k, v, torch.cat(raws, dim=1) if raws else None)
