"""For code of the Self-Forcing kind: a drop-in for its list of cache dicts and for its self-attention call."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from echo_infinity.cache import Call, Geometry, RingKV
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.recall import StreamMemory

_INDICES = ("global_end_index", "local_end_index")


class StreamCache(list["LayerCache"]):
    """Stands where ``kv_cache`` was: one mapping a layer with ``k``, ``v`` and the two end indices.

    The calls of a block come as ever, denoising passes and the context pass with the same ``current_start``; the
    memory is written in the first of them and read from the second on.

    Args:
        config: geometry; its ``tokens_per_frame`` must be what the code counts ``current_start`` in.
        memory: the memory's weights, or None.
        batch: ``B``.
        dtype: of keys and values.
        device: where they live.

    Source: docs/method.md sections 2 to 5.
    """

    def __init__(
        self,
        config: EchoConfig,
        memory: EvolvingMemory | None = None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(LayerCache(self, layer) for layer in range(config.model.layers))
        self.config = config
        self.ring = RingKV(config, batch, dtype, device)
        self.memory = None if memory is None else StreamMemory(memory, config, batch)
        self._geometry = Geometry(config, device)
        self._call: Call | None = None
        self._end = 0

    @property
    def frames(self) -> int:
        """Frames seen so far."""
        return self._end

    def reset(self) -> None:
        """Start a new stream; the code's own way, an end index of zero, does the same."""
        self._call, self._end = None, 0
        if self.memory is not None:
            self.memory.reset()

    @torch.no_grad()
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor], current_start: int
    ) -> Tensor:
        """Append a block's keys and values to a layer and attend to sink, memory and local frames.

        Args:
            layer: its index; a call's layers come in order, from 0.
            q: ``(B, T, H, d)`` queries, before norm and rotation; ``k`` and ``v`` likewise.
            norms: ``(D,)`` scales of the query and key norms.
            current_start: tokens before the block.

        Returns:
            ``(B, T, H, d)``.

        Raises:
            ValueError: no whole number of frames, or a block that neither follows the last one nor is it.
        """
        if layer == 0 or self._call is None:
            self._begin(current_start, q.shape[1])
        call = self._call
        assert call is not None
        memory = None if self.memory is None else self.memory.read(call)
        out = self.ring.attend(layer, q, k, v, norms, call, None if memory is None else memory[layer])
        assert out is not None
        return out

    def _begin(self, current_start: int, tokens: int) -> None:
        """Plan a call; what the last call's layers left to do for the memory happens first."""
        per_frame = self.config.tokens_per_frame
        start, frames = current_start // per_frame, tokens // per_frame
        if current_start % per_frame or tokens % per_frame:
            raise ValueError(f"{tokens} tokens from {current_start} are no whole frames of {per_frame} tokens")
        again = self._call is not None and (self._call.start, self._call.frames) == (start, frames)
        if not again and start != self._end:
            raise ValueError(f"a block from frame {start} after {self._end} frames: blocks must follow each other")
        if self.memory is not None:
            self.memory.publish()
        if again:
            return
        count = 0 if self.memory is None else self.memory.module.config.frames
        self._call = self._geometry.call(start, frames, memory_frames=count)
        self._end = start + frames
        if self.memory is not None:
            self.memory.prepare(self.ring, self._call)


class LayerCache(MutableMapping[str, Any]):
    """One layer's share of a :class:`StreamCache`, read and reset like the dict it replaces."""

    def __init__(self, owner: StreamCache, layer: int) -> None:
        self.owner, self.layer = owner, layer

    def __getitem__(self, key: str) -> Tensor:
        if key in ("k", "v"):
            return getattr(self.owner.ring, key)[self.layer]
        if key not in _INDICES:
            raise KeyError(key)
        held, size = self.owner.frames, self.owner.config.window.window_frames
        frames = held if key == "global_end_index" else min(held, size)
        return torch.tensor([frames * self.owner.config.tokens_per_frame])

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in _INDICES:
            raise KeyError(f"{key} is the stream's own; only an end index can be set, to zero")
        if int(torch.as_tensor(value).sum()) != 0:
            raise ValueError(f"{key} can only be set to zero, which starts a new stream, got {value}")
        if self.owner.frames:
            self.owner.reset()

    def __delitem__(self, key: str) -> None:
        raise KeyError(f"{key} can't be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(("k", "v", *_INDICES))

    def __len__(self) -> int:
        return 2 + len(_INDICES)


def streaming_self_attention(
    self: Any,
    x: Tensor,
    seq_lens: Any,
    grid_sizes: Any,
    freqs: Any,
    block_mask: Any,
    kv_cache: Any = None,
    current_start: int = 0,
    cache_start: int | None = None,
) -> Tensor:
    """Stand in for ``CausalWanSelfAttention.forward``: the same arguments, on a layer of a :class:`StreamCache`.

    Put it on the class, or on a module with ``types.MethodType``. Its ``q``, ``k``, ``v``, ``o``, ``norm_q`` and
    ``norm_k`` are used as they are; lengths, grid, frequencies and mask are not needed.

    Returns:
        ``(B, T, D)``.

    Raises:
        TypeError: ``kv_cache`` is something else: training passes, without a cache, need the original forward.
    """
    if not isinstance(kv_cache, LayerCache):
        raise TypeError(f"kv_cache must be a layer of a StreamCache, got {type(kv_cache).__name__}")
    q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)) for linear in (self.q, self.k, self.v))
    norms = self.norm_q.weight, self.norm_k.weight
    out = kv_cache.owner.attend(kv_cache.layer, q, k, v, norms, current_start)
    return self.o(out.flatten(2))
