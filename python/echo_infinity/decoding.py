"""The decoder's side of a stream: what it carries from block to block, and the blocks that wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from echo_infinity.codec import TIME_STRIDE, VideoCodec, to_uint8
from echo_infinity.finite import NonFiniteError
from echo_infinity.lane import Lane


class _Waiting(NamedTuple):
    """A block for the decoder, which starts anew where a shot begins."""

    latents: Tensor
    begins_shot: bool


class BlockDecoder:
    """Decode a stream's blocks in order, in a thread of the caller's.

    Args:
        codec: the pipeline's.
        device: the stream's.
    """

    def __init__(self, codec: VideoCodec, device: torch.device) -> None:
        self._codec, self._device = codec, device
        self._lane = Lane(device)
        self.state: dict[str, Tensor] | None = None
        self._waiting: deque[_Waiting] = deque()
        self._handover = threading.Lock()  # a decoded block leaves as the decoder's state moves on

    @property
    def waiting(self) -> tuple[Tensor, ...]:
        """Latents of the blocks that are not decoded yet, oldest first."""
        return tuple(block.latents for block in self._waiting)

    @property
    def undecoded(self) -> int:
        """Pixel frames that they stand for; the first latent of a shot is one, others ``TIME_STRIDE``."""
        return sum(TIME_STRIDE * len(x) - (TIME_STRIDE - 1 if begins else 0) for x, begins in self._waiting)

    def put(self, latents: Tensor, *, begins_shot: bool) -> None:
        """Have the block that was just made wait."""
        self._lane.made()
        with self._handover:
            self._waiting.append(_Waiting(latents, begins_shot))

    def drop(self) -> None:
        """Let go of the block that waits longest, if one does."""
        with self._handover:
            if self._waiting:
                self._waiting.popleft()

    def decode(self, latents: Tensor, *, begins_shot: bool, check: Callable[[], None]) -> Tensor:
        """Decode the block that waits longest, or the caller's own.

        Args:
            latents: ``(F, C, h, w)``.
            begins_shot: whether the caller's own does; of one that waits it is known.
            check: called once the pixels are there; raises if the latents were not finite.

        Returns:
            ``(N, H, W, 3)`` uint8 on the CPU.

        Raises:
            NonFiniteError: NaN or Inf; the block still waits.
        """
        with torch.inference_mode(), self._lane.use(latents):
            begins = self._waiting[0].begins_shot if self._waiting else begins_shot
            pixels, state = self._codec.decode(latents[None].to(self._device), None if begins else self.state)
            if not torch.isfinite(pixels).all():
                raise NonFiniteError("the decoder gave NaN or Inf; resume from the last saved state")
            frames = to_uint8(pixels[0]).permute(0, 2, 3, 1).cpu()
        check()  # the pixels were waited for: the answers are there
        with self._handover:
            self.state = state
            if self._waiting:
                self._waiting.popleft()
        return frames.clone(memory_format=torch.contiguous_format)

    def tensors(self) -> dict[str, Tensor]:
        """What waits and what is carried, at one instant, by name."""
        with self._handover:
            named = {f"waiting.{i}": x for i, x in enumerate(self.waiting)}
            return named | {f"codec.{name}": x for name, x in (self.state or {}).items()}

    def load(self, named: Mapping[str, Tensor], end: int, shots: Collection[int]) -> None:
        """Go on from copies of what :meth:`tensors` returned.

        Args:
            named: tensors by name, others among them.
            end: number of the block after those that wait.
            shots: blocks with which shots begin.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            given = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
            return {name: x.to(self._device, copy=True) for name, x in given.items()}

        self.state, waiting = part("codec.") or None, part("waiting.")
        for i in range(len(waiting)):
            self._waiting.append(_Waiting(waiting[str(i)], end - len(waiting) + i in shots))
