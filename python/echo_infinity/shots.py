"""A stream's place: sampler, prompts and decoder from block to block and from shot to shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from echo_infinity.codec import TIME_STRIDE
from echo_infinity.config import EchoConfig
from echo_infinity.decoding import BlockDecoder
from echo_infinity.script import Script

if TYPE_CHECKING:
    from echo_infinity.rows import RowSampler
    from echo_infinity.sampler import BlockSampler

_SAMPLER = "sampler."


class Shots:
    """All that a stream's future depends on.

    Args:
        config: geometry and frame rate.
        sampler: makes the blocks.
        script: what they are to show.
        decoder: makes their pixels.
    """

    def __init__(
        self, config: EchoConfig, sampler: BlockSampler | RowSampler, script: Script, decoder: BlockDecoder
    ) -> None:
        self.sampler, self.script, self.decoder = sampler, script, decoder
        self._fps, self._latents = config.fps, config.window.frames_per_block
        self._before = 0  # pixel frames of the shots before this one

    @property
    def frames(self) -> int:
        """Pixel frames that the blocks so far stand for; the first latent of a shot is one, others ``TIME_STRIDE``."""
        return self._before + max(0, TIME_STRIDE * self.sampler.frame - (TIME_STRIDE - 1))

    @property
    def seconds(self) -> float:
        """Length so far."""
        return self.frames / self._fps

    @property
    def begins_shot(self) -> bool:
        """Whether the newest block is the first of its shot."""
        return self.sampler.frame == self._latents

    @property
    def block_began(self) -> float:
        """Seconds at which the block began whose prompt is in effect: the newest, or one that could not be made yet."""
        if self.script.past[-1].block == self.sampler.block:
            return self.seconds
        own = TIME_STRIDE * self._latents - (TIME_STRIDE - 1 if self.begins_shot else 0)
        return (self.frames - own) / self._fps

    def look_ahead(self) -> bool:
        """Ask for the prompt that the schedule has for the next block; return whether that block begins a new shot."""
        self.script.follow(self.seconds, self.sampler.block)
        waits = self.script.waiting
        return waits is not None and waits[0].cut and self.sampler.frame > 0

    def begin_block(self) -> None:
        """Change the prompt, if the next block has another."""
        cut = self.look_ahead()
        if self.script.waiting is None:
            return
        change, text = self.script.waiting
        if cut:
            before = self.frames
            self.sampler.cut(text)
            self.enter(before)
        else:  # at a shot's start there is nothing to cut
            self.sampler.switch(text, global_sink=change.global_sink, memory_recache=change.memory_recache)
            self.script.enter(self.sampler.block, cut=False)

    def enter(self, frames: int) -> None:
        """Note that the sampler has begun a new shot, with the prompt that waited, after so many pixel frames."""
        self._before = frames
        self.script.enter(self.sampler.block, cut=True)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, views."""
        return {f"{_SAMPLER}{name}": x for name, x in self.sampler.tensors().items()} | self.decoder.tensors()

    def meta(self) -> dict[str, Any]:
        """What goes with the tensors, as JSON values."""
        return {
            **self.script.meta(),
            "frame": self.sampler.frame,
            "blocks": self.sampler.block,
            "frames": self.frames,
        }

    def load(self, named: Mapping[str, Tensor], frame: int) -> None:
        """Go on from copies of what :meth:`tensors` returned, at the shot's latent frame ``frame`` of this script."""
        cuts = self.script.cuts
        first_block = cuts[-1] if cuts else 0
        own = {name.removeprefix(_SAMPLER): x for name, x in named.items() if name.startswith(_SAMPLER)}
        self.sampler.load_tensors(own, frame, first_block)
        self._before = TIME_STRIDE * self._latents * first_block - (TIME_STRIDE - 1) * len(cuts)
        self.decoder.load(named, first_block + frame // self._latents, {0, *cuts})
