"""A running stream: frames block by block, prompt switches, save, fork."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from echo_infinity.cache import KV
from echo_infinity.codec import TIME_STRIDE, to_uint8, to_unit
from echo_infinity.finite import NonFiniteError
from echo_infinity.lane import Lane
from echo_infinity.noise import counter_noise
from echo_infinity.prompts import TimedPrompt, due
from echo_infinity.settings import PromptChange, StreamSettings
from echo_infinity.state import SavedStream, SavedVideo, write_state

if TYPE_CHECKING:
    from echo_infinity.batch import RowSampler
    from echo_infinity.pipeline import EchoPipeline
    from echo_infinity.sampler import BlockSampler


class AutosaveWarning(UserWarning):
    """A stream couldn't be saved on time; it goes on, and the state saved before is still there."""


class _Waiting(NamedTuple):
    """A block for the decoder, which starts anew where a shot begins."""

    latents: Tensor
    begins_shot: bool


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
        self.prompts: list[PromptChange] = [prompt]
        self.video: SavedVideo | None = None  # of the run that a resumed stream continues
        self.resumed: Path | None = None  # and its file
        if sampler is None:
            noise = settings.noise or counter_noise(settings.seed)
            pipe.generator(settings.memory)  # refuses before the prompt is encoded
            sampler = pipe.sampler(settings.memory, pipe.encode_prompt(prompt.prompt), noise, settings.memory_dtype)
        self._sampler = sampler
        self._decoder: dict[str, Tensor] | None = None
        self._switch: tuple[PromptChange, list[KV]] | None = None
        self._waiting: deque[_Waiting] = deque()  # blocks that are not decoded yet
        self._handover = threading.Lock()  # a decoded block leaves as the decoder's state moves on
        self._frames_before = 0  # of the shots before this one
        self.schedule: deque[TimedPrompt] = deque()  # what is still to come
        self._lane = Lane(pipe.device)
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
        return self._frames_before + max(0, TIME_STRIDE * self._sampler.frame - (TIME_STRIDE - 1))

    @property
    def seconds(self) -> float:
        """Length of the stream so far."""
        return self.frames / self.pipe.config.fps

    @property
    def prompt(self) -> str:
        """The prompt in effect."""
        return self.prompts[-1].prompt

    @property
    def waiting(self) -> tuple[Tensor, ...]:
        """Latents of the blocks that are generated and not decoded, oldest first; they are saved with the stream."""
        return tuple(block.latents for block in self._waiting)

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
            return self.finish(self._waiting[0].latents if self._waiting else self.next_latents())

    def finish(self, latents: Tensor) -> Tensor:
        """Make of a block's latents what iterating gives, and tell the callback."""
        pixels = self.settings.output_type == "pixels"
        if not pixels and self._waiting:  # of the saved stream, which had pixels
            self._waiting.popleft()
        output = self.decode(latents) if pixels else latents
        if self.settings.callback is not None:
            self.settings.callback(self, self.block - 1 - len(self._waiting), output)
        return output

    def next_latents(self) -> Tensor:
        """Generate a block and leave its decoding to the caller, who hands it to :meth:`decode`, say in a thread.

        Returns:
            ``(F, C, h, w)`` float32.

        Raises:
            NonFiniteError: as iteration does.
            ValueError: the stream is closed.
        """
        with self.lock:
            self.begin_block()
            return self.take_block()

    def look_ahead(self) -> bool:
        """Ask for the prompt that the schedule has for the next block; return whether that block begins a new shot.

        Raises:
            NonFiniteError, ValueError: the stream can't go on.
        """
        self._check_usable()
        self._follow_schedule()
        return self._switch is not None and self._switch[0].cut and self._sampler.frame > 0

    def begin_block(self) -> None:
        """Change the prompt, if the next block has another."""
        self.look_ahead()
        if self._switch is not None:
            self._apply_switch()

    def take_block(self) -> Tensor:
        """Generate the block, as :meth:`next_latents` returns it."""
        try:
            latents = self._sampler.next_block()
        except NonFiniteError as error:
            self._failure = error
            raise
        own = latents[0].clone()  # a plain tensor, not one of inference mode
        self._lane.made()
        if self.settings.output_type == "pixels":
            self._waiting.append(_Waiting(own, self._begins_shot))
        return own

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the blocks of :meth:`next_latents`, each once and in order.

        Args:
            latents: ``(F, C, h, w)``.

        Returns:
            ``(N, H, W, 3)`` uint8 on the CPU.

        Raises:
            NonFiniteError: the decoder gave NaN or Inf.
        """
        with torch.inference_mode(), self._lane.use(latents):
            begins = self._waiting[0].begins_shot if self._waiting else self._begins_shot
            before = None if begins else self._decoder
            pixels, state = self.pipe.codec.decode(latents[None].to(self.pipe.device), before)
            if not torch.isfinite(pixels).all():
                self._failure = NonFiniteError("the decoder gave NaN or Inf; resume from the last saved state")
                raise self._failure
            frames = to_uint8(pixels[0]).permute(0, 2, 3, 1).cpu()
        try:
            self._sampler.finite.check(wait=True)  # the pixels were waited for: the answers are there
        except NonFiniteError as error:
            self._failure = error
            raise
        with self._handover:
            self._decoder = state
            if self._waiting:
                self._waiting.popleft()
        return frames.clone(memory_format=torch.contiguous_format)

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
            self._switch = change, text

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
            tensors = self._tensors()
            if bad := [name for name, x in tensors.items() if x.is_floating_point() and not torch.isfinite(x).all()]:
                self._failure = NonFiniteError(
                    f"{', '.join(bad)} hold NaN or Inf after block {self.block - 1}; not saved: "
                    "resume from the last saved state"
                )
                raise self._failure
            if video is not None:
                tensors["video.rest"] = video.rest
            write_state(path, self._meta(video), tensors)
            self._saved_at = time.monotonic()

    def fork(self) -> Stream:
        """Return an independent stream that goes on from here with the same bits; it has no callback or autosave."""
        with self.lock:
            self._check_usable()
            twin = Stream(self.pipe, self.prompts[-1], replace(self.settings, callback=None, autosave=None))
            twin.prompts = list(self.prompts)
            twin._load(self._tensors(), self._sampler.frame)
            twin._switch, twin.schedule = self._switch, self.schedule.copy()
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
        self.prompts = [PromptChange(**change) for change in saved.meta["prompts"]]
        self._load(saved.tensors, saved.meta["frame"])
        self.video, self.resumed = saved.video, saved.path
        self.schedule.extend(TimedPrompt(**prompt) for prompt in saved.meta.get("schedule", []))
        if saved.meta["switch"] is not None:
            change = PromptChange(**saved.meta["switch"])
            self._switch = change, self.pipe.encode_prompt(change.prompt)

    @property
    def _begins_shot(self) -> bool:
        """Whether the block made last is the first of its shot."""
        return self._sampler.frame == self.pipe.config.window.frames_per_block

    def _apply_switch(self) -> None:
        assert self._switch is not None
        change, text = self._switch
        if change.cut and self._sampler.frame:
            before = self.frames
            self._sampler.cut(text)
            self._frames_before = before
        else:  # at a shot's start there is nothing to cut
            change = replace(change, cut=False)
            self._sampler.switch(text, global_sink=change.global_sink, memory_recache=change.memory_recache)
        self.prompts.append(replace(change, block=self.block))
        self._switch = None

    def _follow_schedule(self) -> None:
        """Ask for the newest prompt that is due; a cut that was passed over still cuts."""
        passed = [self.schedule.popleft() for _ in range(due(self.schedule, self.seconds))]
        if passed:
            self.switch(passed[-1].prompt, cut=any(prompt.cut for prompt in passed))

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ValueError("the stream is closed; start or resume another")

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"sampler.{name}": x for name, x in self._sampler.tensors().items()}
        with self._handover:
            named |= {f"waiting.{i}": x for i, x in enumerate(self.waiting)}
            return named | {f"codec.{name}": x for name, x in (self._decoder or {}).items()}

    def _load(self, tensors: dict[str, Tensor], frame: int) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        cuts = [change.block for change in self.prompts if change.cut]
        first_block = cuts[-1] if cuts else 0
        per_block = self.pipe.config.window.frames_per_block
        self._sampler.load_tensors(part("sampler."), frame, first_block)
        self._frames_before = TIME_STRIDE * per_block * first_block - (TIME_STRIDE - 1) * len(cuts)
        device = self.pipe.device
        self._decoder = {name: x.to(device, copy=True) for name, x in part("codec.").items()} or None
        waiting, end = part("waiting."), first_block + frame // per_block
        for i in range(len(waiting)):
            begins = end - len(waiting) + i in {0, *cuts}
            self._waiting.append(_Waiting(waiting[str(i)].to(device, copy=True), begins))

    def _meta(self, video: SavedVideo | None) -> dict[str, Any]:
        s = self.settings
        return {
            "config": json.loads(self.pipe.config.to_json()),
            "fingerprint": self.pipe.fingerprint,
            "source": self.pipe.source,
            "parts": self.pipe.parts,
            "environment": self.pipe.environment(),
            "seed": s.seed,
            "noise": "counter" if s.noise is None else "injected",
            "memory": s.memory,
            "memory_dtype": None if s.memory_dtype is None else str(s.memory_dtype).removeprefix("torch."),
            "output_type": s.output_type,
            "prompts": [asdict(change) for change in self.prompts],
            "schedule": [asdict(prompt) for prompt in self.schedule],
            "switch": None if self._switch is None else asdict(self._switch[0]),
            "frame": self._sampler.frame,
            "blocks": self.block,
            "frames": self.frames,
            "video": None
            if video is None
            else {"position": video.position.to_dict(), "path": video.path, "target": video.target},
        }

    def _autosave(self) -> None:
        path, every = self.settings.autosave, self.settings.autosave_every
        if path is None or time.monotonic() - self._saved_at < every:
            return
        try:
            self.save(path)
        except OSError as error:
            self._saved_at = time.monotonic()
            warnings.warn(f"could not save the stream to {path}: {error}; it goes on", AutosaveWarning, stacklevel=3)
