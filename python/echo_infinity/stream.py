"""A running stream: frames block by block, prompt switches, save, fork."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_infinity.codec import to_unit
from echo_infinity.decoding import BlockDecoder
from echo_infinity.finite import NonFiniteError, is_finite
from echo_infinity.noise import counter_noise
from echo_infinity.prompts import TimedPrompt
from echo_infinity.script import Script
from echo_infinity.settings import PromptChange, StreamSettings
from echo_infinity.shots import Shots
from echo_infinity.state import SavedStream, SavedVideo, write_state

if TYPE_CHECKING:
    from echo_infinity.pipeline import EchoPipeline
    from echo_infinity.rows import RowSampler
    from echo_infinity.sampler import BlockSampler


class AutosaveWarning(UserWarning):
    """A stream couldn't be saved on time; it goes on, and the state saved before is still there."""


class Stream:
    """Iterate to get blocks for ever; made by :meth:`EchoPipeline.stream` and :meth:`EchoPipeline.resume`.

    An iteration gives ``(N, H, W, 3)`` uint8 on the CPU, N 9 in the first block and 12 later (three latents stand for
    1 + 4 + 4, later 4 + 4 + 4 frames), or ``(F, C, h, w)`` float32 latents. Methods may be called from other threads:
    they wait for the block in work.
    """

    def __init__(
        self,
        pipe: EchoPipeline,
        prompt: PromptChange,
        settings: StreamSettings,
        sampler: BlockSampler | RowSampler | None = None,
    ) -> None:
        self.pipe, self.settings = pipe, settings
        self.video: SavedVideo | None = None  # of the run that a resumed stream continues
        self.resumed: Path | None = None  # and its file
        if sampler is None:
            noise = settings.noise or counter_noise(settings.seed)
            pipe.generator(settings.memory)  # refuses before the prompt is encoded
            sampler = pipe.sampler(settings.memory, pipe.encode_prompt(prompt.prompt), noise, settings.memory_dtype)
        self._sampler = sampler
        self.shots = Shots(
            pipe.config, sampler, Script(prompt, pipe.encode_prompt), BlockDecoder(pipe.codec, pipe.device)
        )
        self._failure: NonFiniteError | None = None
        self._closed = False
        self.lock = threading.RLock()
        self._saved_at = time.monotonic()

    @property
    def block(self) -> int:
        """Number of the next block: blocks generated so far."""
        return self._sampler.block

    @property
    def frames(self) -> int:
        """Pixel frames that the blocks so far stand for."""
        return self.shots.frames

    @property
    def seconds(self) -> float:
        """Length of the stream so far."""
        return self.shots.seconds

    @property
    def prompt(self) -> str:
        """The prompt in effect."""
        return self.prompts[-1].prompt

    @property
    def prompts(self) -> list[PromptChange]:
        """Each prompt so far with the block at which it began."""
        return self.shots.script.past

    @property
    def schedule(self) -> deque[TimedPrompt]:
        """Prompts that are still to come."""
        return self.shots.script.coming

    @property
    def switching(self) -> bool:
        """Whether another prompt waits for the next block."""
        return self.shots.script.waiting is not None

    @property
    def waiting(self) -> tuple[Tensor, ...]:
        """Latents of the blocks that are generated and not decoded, oldest first; they are saved with the stream."""
        return self.shots.decoder.waiting

    @property
    def undecoded(self) -> int:
        """Pixel frames that those stand for."""
        return self.shots.decoder.undecoded

    @property
    def closed(self) -> bool:
        """Whether the stream was closed."""
        return self._closed

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Generate a block; one that waits for the decoder comes first.

        Raises:
            NonFiniteError: NaN or Inf; every later call raises it again, and the stream can't be saved any more.
            StopIteration: the stream is closed.
        """
        with self.lock:
            if self._closed:
                raise StopIteration
            self._autosave()
            waiting = self.waiting
            output = self.finish(waiting[0] if waiting else self.next_latents())
            self.tell(output)
            return output

    def finish(self, latents: Tensor) -> Tensor:
        """Make of a block's latents what iterating gives."""
        if self.settings.output_type == "pixels":
            return self.decode(latents)
        self.shots.decoder.drop()  # one of the saved stream, which had pixels
        return latents

    def tell(self, output: Tensor) -> None:
        """Tell the callback of the block that :meth:`finish` returned."""
        with self.lock:
            if self.settings.callback is not None:
                self.settings.callback(self, self.block - 1 - len(self.waiting), output)

    def next_latents(self) -> Tensor:
        """Generate a block and leave its decoding to the caller, who hands it to :meth:`decode`, say in a thread.

        Returns:
            ``(F, C, h, w)`` float32.

        Raises:
            NonFiniteError: as iteration does.
            ValueError: the stream is closed.
        """
        with self.lock:
            self._check_usable()
            self.shots.begin_block()
            return self.take_block()

    def look_ahead(self) -> bool:
        """Ask for the prompt that the schedule has for the next block; return whether that block begins a new shot.

        Raises:
            NonFiniteError, ValueError: the stream can't go on.
        """
        self._check_usable()
        return self.shots.look_ahead()

    def take_block(self) -> Tensor:
        """Generate the block, as :meth:`next_latents` returns it."""
        try:
            latents = self._sampler.next_block()
        except NonFiniteError as error:
            self.fail(error)
            raise
        own = latents[0].clone()  # a plain tensor, not one of inference mode
        if self.settings.output_type == "pixels":
            self.shots.decoder.put(own, begins_shot=self.shots.begins_shot)
        return own

    def fail(self, error: NonFiniteError) -> None:
        """Have every later call raise ``error``."""
        self._failure = error

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the blocks of :meth:`next_latents`, each once and in order.

        Args:
            latents: ``(F, C, h, w)``.

        Returns:
            ``(N, H, W, 3)`` uint8 on the CPU.

        Raises:
            NonFiniteError: the decoder gave NaN or Inf.
        """
        finite = self._sampler.finite
        try:
            return self.shots.decoder.decode(
                latents, begins_shot=self.shots.begins_shot, check=lambda: finite.check(wait=True)
            )
        except NonFiniteError as error:
            self.fail(error)
            raise

    def switch(self, prompt: str, *, global_sink: bool = True, memory_recache: bool = False, cut: bool = False) -> None:
        """Change the prompt at the next block boundary; a later call before it replaces this one.

        Args:
            prompt: the new text.
            global_sink: keep the sink's keys and values, which hold the first scene; False re-makes them too.
            memory_recache: start the memory over from the frames in the window.
            cut: begin a new shot instead, as a new stream would: nothing of the frames before is seen or remembered.

        Raises:
            ValueError: an empty or too long prompt, or the stream is closed.
        """
        change = PromptChange(prompt, self.block, global_sink, memory_recache, cut)
        text = self.pipe.encode_prompt(prompt)
        with self.lock:
            self._check_usable()
            self.shots.script.waiting = change, text

    def reschedule(self, schedule: Sequence[TimedPrompt]) -> None:
        """Follow another schedule from here on, in place of what waits and what is still to come.

        Args:
            schedule: in order of time; the prompt that it had for the newest block comes first, if it is not in effect.

        Raises:
            ValueError: a prompt is empty, too long, or without a known word, or the stream is closed.
        """
        self.pipe.check_prompts(schedule)
        with self.lock:
            self._check_usable()
            self.shots.script.rewrite(schedule, self.shots.block_began, self.block)

    @torch.inference_mode()
    def start_from(self, image: Tensor) -> None:
        """Give the first frame of the stream, before its first block.

        Args:
            image: ``(H, W, 3)`` uint8.

        Raises:
            ValueError: another shape or type, the stream has begun, or the model can't.
        """
        shape = *self.pipe.size, 3
        if image.shape != shape or image.dtype != torch.uint8:
            raise ValueError(f"an image is {shape} uint8 here, got {tuple(image.shape)} {image.dtype}")
        frame = to_unit(image).permute(2, 0, 1)[None, None].to(self.pipe.device)
        with self.lock:
            self._check_usable()
            latents, _ = self.pipe.codec.encode(frame)
            self._sampler.start_from(latents)

    def save(self, path: str | os.PathLike[str], *, video: SavedVideo | None = None) -> None:
        """Write everything that the stream's future depends on to one file, in place of what was there.

        Args:
            path: a ``.safetensors`` file.
            video: where the stream's video stands, for a resume to go on with it.

        Raises:
            NonFiniteError: the stream holds NaN or Inf; the file is left as it was.
            OSError: the disk refused; the file is left as it was.
            ValueError: the stream is closed.
        """
        with self.lock:
            self._check_usable()
            tensors = self.shots.tensors()
            if bad := [name for name, x in tensors.items() if x.is_floating_point() and not is_finite(x)]:
                error = NonFiniteError(
                    f"{', '.join(bad)} hold NaN or Inf after block {self.block - 1}; not saved: "
                    "resume from the last saved state"
                )
                self.fail(error)
                raise error
            if video is not None:
                tensors["video.rest"] = video.rest
            meta = {**self.pipe.meta(), **self.settings.meta(), **self.shots.meta()}
            write_state(path, meta | {"video": None if video is None else video.meta()}, tensors)
            self._saved_at = time.monotonic()

    def fork(self) -> Stream:
        """Return an independent stream that goes on from here with the same bits; it has no callback or autosave."""
        with self.lock:
            self._check_usable()
            twin = Stream(self.pipe, self.prompts[-1], replace(self.settings, callback=None, autosave=None))
            twin.shots.script = self.shots.script.copy()
            twin.shots.load(self.shots.tensors(), self._sampler.frame)
            return twin

    def close(self) -> None:
        """Stop; the stream's memory is freed once nothing refers to it."""
        with self.lock:
            self._closed = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def restore(self, saved: SavedStream) -> None:
        """Take the place of a saved stream; :meth:`EchoPipeline.resume` checks that it may."""
        self.shots.script.restore(saved.meta)
        self.shots.load(saved.tensors, saved.meta["frame"])
        self.video, self.resumed = saved.video, saved.path

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ValueError("the stream is closed; start or resume another")

    def _autosave(self) -> None:
        path, every = self.settings.autosave, self.settings.autosave_every
        if path is None or time.monotonic() - self._saved_at < every:
            return
        try:
            self.save(path)
        except OSError as error:
            self._saved_at = time.monotonic()
            warnings.warn(f"could not save the stream to {path}: {error}; it goes on", AutosaveWarning, stacklevel=3)
