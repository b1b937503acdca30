"""The cache of a process: its own heads of every frame, and all heads for whoever reads what leaves the window."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ext import rms_norm
from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.config import EchoConfig
from echo_infinity.fp8 import Fp8RingKV
from echo_infinity.parallel.split import Split


class SplitRing(RingKV):
    """A ring of own heads. Queries and keys are normalised over all heads before they change hands.

    Args:
        config: geometry.
        batch: ``B``.
        dtype: of keys and values.
        device: where the buffers live.
        split: whose heads.
    """

    def __init__(
        self, config: EchoConfig, batch: int, dtype: torch.dtype, device: torch.device | str | None, *, split: Split
    ) -> None:
        super().__init__(config, batch, dtype, device, heads=split.heads)
        self.split = split

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
        """Append and attend as :meth:`RingKV.attend` does: own tokens of all heads in, the same out."""
        q, k = (self._normalise(x, weight) for x, weight in zip((q, k), norms, strict=True))
        q, k, v = self.split.to_heads(q, k, v)
        own = None if memory is None else (memory[0][:, :, self.split.own], memory[1][:, :, self.split.own])
        y = super().attend(layer, q, k, v, (None, None), call, own, output=output)
        return None if y is None else self.split.to_tokens(y)

    def evicted(self, call: Call) -> list[KV]:
        """Copies of all heads of what ``call`` will overwrite in the last layer."""
        return [self._whole(pair) for pair in super().evicted(call)]

    def held(self, frames: range) -> list[KV]:
        """Every layer's K and V of ``frames``, all heads."""
        return [self._whole(pair) for pair in super().held(frames)]

    def local(self, start: int) -> list[KV]:
        """Copies of all heads of the last layer's local frames."""
        return [self._whole(pair) for pair in super().local(start)]

    def sink(self) -> KV:
        """Copies of all heads of the last layer's sink frames."""
        return self._whole(super().sink())

    def _whole(self, pair: KV) -> KV:
        return self.split.all_heads(pair[0]), self.split.all_heads(pair[1])

    def _normalise(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x.flatten(-2), weight, self.config.model.eps).view(x.shape)


class SplitFp8Ring(SplitRing, Fp8RingKV):
    """The same, kept in e4m3: scales are of a token and head, so the codes are those of one process."""
