"""Which tokens and heads are a process's own, and how they change hands."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

from echo_infinity.config import EchoConfig
from echo_infinity.ranks import Ranks


class Split:
    """A process's share of a model's work: a run of every frame's tokens, and a run of the heads.

    Args:
        config: geometry.
        ranks: the processes.

    Raises:
        ValueError: heads or tokens can't be shared out evenly; says among how many they can.
    """

    def __init__(self, config: EchoConfig, ranks: Ranks) -> None:
        heads, tokens, world = config.model.heads, config.tokens_per_frame, ranks.world
        if heads % world or tokens % world:
            most = math.gcd(heads, tokens)
            fits = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            raise ValueError(
                f"{heads} heads and {tokens} tokens a frame can't be shared out evenly among {world} processes: "
                f"{config.name} runs on {fits}"
            )
        self.ranks, self.world = ranks, world
        self.tokens_per_frame = tokens
        self.heads = heads // world
        self.own = slice(ranks.rank * self.heads, (ranks.rank + 1) * self.heads)

    @property
    def first(self) -> bool:
        """Whether this is the process that leads."""
        return self.ranks.rank == 0

    def own_tokens(self, x: Tensor) -> Tensor:
        """This process's tokens of each frame: ``(B, F * T_f, ...)`` to ``(B, F * T_f / P, ...)``."""
        share = self.tokens_per_frame // self.world
        frames = x.unflatten(1, (-1, self.tokens_per_frame))
        return frames[:, :, self.ranks.rank * share : (self.ranks.rank + 1) * share].flatten(1, 2)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Every process's tokens, in their order: undoes :meth:`own_tokens`."""
        return self.ranks.join(x.unflatten(1, (-1, self.tokens_per_frame // self.world)), 2).flatten(1, 2)

    def all_heads(self, x: Tensor) -> Tensor:
        """Every process's heads of ``(B, T, H / P, d)``: ``(B, T, H, d)``."""
        return self.ranks.join(x, 2)

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Give away tokens for heads, in one message.

        Args:
            parts: own tokens of all heads, ``(B, F * T_f / P, H, d)`` each.

        Returns:
            All tokens of the own heads, ``(B, F * T_f, H / P, d)`` each.
        """
        b, _, _, d = parts[0].shape
        share = self.tokens_per_frame // self.world
        cut = [x.reshape(b, -1, share, self.world, self.heads, d).permute(3, 0, 1, 2, 4, 5) for x in parts]
        got = self._exchange(torch.stack(cut, dim=1))  # (P, n, B, F, T_f / P, H / P, d), of process p its tokens
        return got.permute(1, 2, 3, 0, 4, 5, 6).reshape(len(parts), b, -1, self.heads, d).unbind()

    def to_tokens(self, x: Tensor) -> Tensor:
        """Give heads back for tokens: ``(B, F * T_f, H / P, d)`` to ``(B, F * T_f / P, H, d)``."""
        b, _, _, d = x.shape
        share = self.tokens_per_frame // self.world
        cut = x.reshape(b, -1, self.world, share, self.heads, d).permute(2, 0, 1, 3, 4, 5)
        got = self._exchange(cut.contiguous())  # (P, B, F, T_f / P, H / P, d), of process p its heads
        return got.permute(1, 2, 3, 0, 4, 5).reshape(b, -1, self.world * self.heads, d)

    def gather_heads(self, x: Tensor) -> Tensor | None:
        """Every process's heads on the first process's CPU; None on the others."""
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.first else None
        distributed.gather(own, parts, dst=0)
        return None if parts is None else torch.cat([part.cpu() for part in parts], dim=2)

    def scatter_heads(self, own: Tensor, whole: Tensor | None) -> None:
        """Write each process's heads of the first process's ``whole`` into ``own``."""
        parts = None
        if whole is not None:
            parts = [part.to(own.device, own.dtype).contiguous() for part in whole.split(self.heads, dim=2)]
        got = torch.empty_like(own, memory_format=torch.contiguous_format)
        distributed.scatter(got, parts, src=0)
        own.copy_(got)

    def _exchange(self, x: Tensor) -> Tensor:
        """Send row ``p`` of ``x`` to process ``p``; row ``p`` of the result is what it sent here."""
        got = torch.empty_like(x)
        distributed.all_to_all_single(got, x)
        return got
