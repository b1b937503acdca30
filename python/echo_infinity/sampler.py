"""Latent blocks without end: denoise, write the memory, keep clean K/V, emit, forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from echo_infinity.cache import KV, Call, RingKV
from echo_infinity.finite import FiniteWatch
from echo_infinity.fp8 import Fp8RingKV, convert_cache
from echo_infinity.generator import Generator
from echo_infinity.graphs import BlockGraphs
from echo_infinity.model import Conditioning
from echo_infinity.noise import Noise
from echo_infinity.recall import Recall, StreamMemory
from echo_infinity.undo import BlockUndo


class BlockSampler:
    """One stream of latent blocks (or a batch of streams in step); work and memory per block never grow.

    Args:
        generator: weights and tables.
        text: per layer K/V of the prompt, from :meth:`CausalDiT.encode_text`.
        noise: where noise comes from; see :mod:`echo_infinity.noise`.
        batch: ``B``.
        memory_dtype: of the memory state; default the weights'.
        graphs: replay blocks as CUDA graphs once their slots and ids repeat; by default where the model is on a GPU.

    Source: docs/method.md section 5.
    """

    undoes = True  # a block that ran out of memory

    def __init__(
        self,
        generator: Generator,
        text: list[KV],
        noise: Noise,
        batch: int = 1,
        memory_dtype: torch.dtype | None = None,
        graphs: bool | None = None,
    ) -> None:
        config = generator.config
        self.generator, self.text, self.noise, self.batch = generator, text, noise, batch
        self.frame, self.first_block = 0, 0  # the shot's next frame, and the number of its first block
        self.image: Tensor | None = None
        self.cache = self._make_cache()
        self._memory_dtype = memory_dtype
        self.memory = self._make_memory()
        m, w = config.model, config.window
        self._shape = (batch, w.frames_per_block, m.latent_channels, config.latent_rows, config.latent_columns)
        # The last frames' latents, for re-caching under another prompt: frame f in slot f % window_frames.
        self.window = torch.zeros(batch, w.window_frames, *self._shape[2:], device=generator.device)
        self.finite = FiniteWatch()
        on_gpu = generator.device.type == "cuda"
        self.graphs = BlockGraphs(self) if (on_gpu if graphs is None else graphs) else None

    @property
    def block(self) -> int:
        """Number of the next block."""
        return self.first_block + self.frame // self._shape[1]

    def blocks(self) -> Iterator[Tensor]:
        """Yield latent blocks ``(B, F, C, h, w)`` float32 for ever."""
        while True:
            yield self.next_block()

    @torch.inference_mode()
    def next_block(self) -> Tensor:
        """Denoise the next block, write the memory, run the context pass.

        Returns:
            ``(B, F, C, h, w)`` float32 clean latents.

        Raises:
            NonFiniteError: the block holds NaN or Inf (on a GPU perhaps an earlier one: the loop does not wait for the
                answer); the stream's window and memory may be spoilt: resume from the last saved state.
            OutOfMemoryError: torch's; the stream is where it was before the block, and can be saved or tried again
                (under the policies with the model's own memory; what another policy keeps may be spoilt). So it is
                after any other interruption, Ctrl-C among them.
        """
        self.finite.check()
        return self._next()

    def _next(self) -> Tensor:
        call = self._call(self.frame, self._shape[1])
        kept = self.memory if isinstance(self.memory, StreamMemory) and self.undoes else None
        undo = BlockUndo(self.cache, kept, call)
        x = None
        try:
            if self.graphs is not None and not self.graphs.why_not(call):
                x = self.graphs.run(call)
            if x is None:
                x = self.run_calls(call, self.draw)
        except BaseException:
            undo.back()
            raise
        self.finite.note(x, self.block)
        self._remember(x)
        return x

    def start_from(self, image: Tensor) -> None:
        """Give the first frame of the coming shot, whose first block is generated from it.

        Args:
            image: ``(B, 1, C, h, w)`` clean latents of a first frame.

        Raises:
            ValueError: the weights were not trained for it, the shot has begun, or latents of another shape.
        """
        self.check_image(image)
        self.image = image.to(self.generator.device, torch.float32)

    def check_image(self, image: Tensor) -> None:
        """Refuse an image as :meth:`start_from` does; a batch's rows give theirs one at a time."""
        if not self.generator.config.image_start:
            raise ValueError(
                f"the model {self.generator.config.name} was not trained to go on from an image (image_start in its "
                "config.json): start from text alone, or train it with 'train flow --image-share 0.2'"
            )
        if self.frame:
            raise ValueError(f"the shot has begun, it is at frame {self.frame}: an image can only start it")
        batch, frames, *rest = self._shape
        if frames < 2:
            raise ValueError("a block of one frame leaves nothing to generate from an image")
        if image.shape != (batch, 1, *rest):
            raise ValueError(f"an image of this stream is {(batch, 1, *rest)}, got {tuple(image.shape)}")

    def run_calls(self, call: Call, draw: Callable[[int], Tensor]) -> Tensor:
        """Run a block's calls: denoising, the memory's write beside the first of them, the context pass.

        Args:
            call: plan of the block.
            draw: noise of each draw, ``(B, F, C, h, w)``.

        Returns:
            ``(B, F, C, h, w)`` clean latents.
        """
        g = self.generator
        x = self._with_image(draw(0))
        if self.memory is not None:
            self.memory.prepare(self.cache, call)
        for i, t in enumerate(g.timesteps):
            flow = self._flow(x, t, call)
            assert flow is not None
            if i == 0 and self.memory is not None:
                self.memory.publish()
            x = self._with_image(self._step(x, flow, i, draw))
        self._flow(x, 0.0, call, output=False)
        return x

    @property
    def draws(self) -> int:
        """Draws of noise a block takes."""
        return 1 if self.generator.config.sampler.solver == "euler" else len(self.generator.timesteps)

    def draw(self, step: int) -> Tensor:
        """Noise of the coming block: step 0 starts it, step i re-noises before call i; ``(B, F, C, h, w)`` float32."""
        return self.noise(self.block, step, self._shape).to(self.generator.device, non_blocking=True)

    @torch.inference_mode()
    def observe(self, latents: Tensor) -> None:
        """Take a block as given instead of generating it: memory write and context pass on ``(B, F, C, h, w)``.

        Raises:
            ValueError: not one block of this stream's shape.
        """
        if latents.shape != self._shape:
            raise ValueError(f"a block of this stream is {self._shape}, got {tuple(latents.shape)}")
        call = self._call(self.frame, self._shape[1])
        if self.memory is not None:
            self.memory.prepare(self.cache, call)
            self.memory.publish()
        self._flow(latents.float(), 0.0, call, output=False)
        self._remember(latents)

    @torch.inference_mode()
    def switch(self, text: list[KV], *, global_sink: bool = True, memory_recache: bool = False) -> Tensor | None:
        """Change the prompt at the coming block: re-cache the window's K/V under the new text.

        Args:
            text: per layer K/V of the new prompt.
            global_sink: keep the sink's K/V; otherwise they are recomputed too (past the window, from its own first
                frames, as the public code does).
            memory_recache: start the memory over with one write of all local frames; before the first eviction the
                memory is left as it is, inactive, since its ids are only valid once the window is full.

        Returns:
            Flow ``(B, N, C, h, w)`` of the re-cache call, or None at frame 0 where there is nothing to re-cache.

        Source: docs/method.md section 6.
        """
        self.text = text
        if self.frame == 0:
            return None
        w = self.generator.config.window
        saved = None
        if self.frame <= w.window_frames:  # all frames so far, the sink among them
            call = self._call(0, self.frame, recache=True)
            saved = self.cache.copy_sink() if global_sink else None
        elif global_sink:
            call = self._call(self.frame - w.local_frames, w.local_frames, recache=True)
        else:
            call = self._call(self.frame - w.window_frames, w.window_frames, recache=True, sink_ids=False)
        try:
            flow = self._flow(self._recent(call.frames), 0.0, call)
        finally:  # after a failure too: the switch can be tried again, since it makes the rest anew
            if saved is not None:
                self.cache.restore_sink(saved)
        if memory_recache and self.memory is not None and self.memory.active:
            self.memory.rewrite(self.cache.local(self.frame), self.cache)
        return flow

    @torch.inference_mode()
    def cut(self, text: list[KV]) -> None:
        """Begin a new shot at the coming block: nothing of the frames before is seen or remembered.

        Args:
            text: per layer K/V of the new prompt.
        """
        memory = self._make_memory()  # may run out of memory: nothing has changed then
        self.text, self.first_block, self.frame, self.image, self.memory = text, self.block, 0, None, memory
        if self.graphs is not None:
            self.graphs = BlockGraphs(self)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later block depends on, by name; with ``frame``, ``first_block`` and the text they are
        the stream."""
        named = self._buffers() | ({} if self.image is None else {"image": self.image})
        return named if self.memory is None else named | {f"memory.{k}": x for k, x in self.memory.tensors().items()}

    @torch.inference_mode()
    def load_tensors(self, named: Mapping[str, Tensor], frame: int, first_block: int = 0) -> None:
        """Go on from copies of what :meth:`tensors` returned, at latent frame ``frame`` of the shot that began with
        block ``first_block``.

        Raises:
            ValueError: tensors are missing, unexpected, or of another shape; nothing of the cache has changed.
        """
        named = dict(named)
        image = named.pop("image", None)
        own = self._buffers()
        given = self._checked(named, {name: x.shape for name, x in own.items()})
        if self.memory is not None:
            self.memory.load_tensors(memory_part(named, self.generator.device))
        for name, x in own.items():
            x.copy_(given[name])
        self.frame, self.first_block = frame, first_block
        if image is not None:
            self.start_from(image)

    def _buffers(self) -> dict[str, Tensor]:
        """Cache and window by name: what is written in place."""
        return {f"cache.{name}": x for name, x in self.cache.tensors().items()} | {"window": self.window}

    def _checked(self, named: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """What a saved stream holds for buffers of these names and shapes."""
        given = {name: x for name, x in named.items() if not name.startswith("memory.")}
        given = convert_cache(given, self.generator.kv, self.generator.dtype)
        if shapes.keys() != given.keys():
            raise ValueError(
                f"missing or unexpected in the saved stream: {', '.join(sorted(shapes.keys() ^ given.keys()))}"
            )
        for name, shape in shapes.items():
            if shape != given[name].shape:
                raise ValueError(f"saved {name} is {tuple(given[name].shape)}, this stream's {tuple(shape)}")
        return given

    def _make_memory(self) -> Recall | None:
        g = self.generator
        return g.recall(g.memory, g.config, self.batch, self._memory_dtype)

    def _make_cache(self) -> RingKV:
        g = self.generator
        return (Fp8RingKV if g.kv == "fp8" else RingKV)(g.config, self.batch, g.dtype, g.device)

    def _remember(self, latents: Tensor) -> None:
        for i in range(latents.shape[1]):
            self.window[:, (self.frame + i) % self.window.shape[1]] = latents[:, i]
        self.frame += latents.shape[1]
        self.image = None

    def _recent(self, frames: int) -> Tensor:
        """Clean latents of the last ``frames`` frames, oldest first."""
        return self.window[:, [f % self.window.shape[1] for f in range(self.frame - frames, self.frame)]]

    def _call(self, start: int, frames: int, *, recache: bool = False, sink_ids: bool = True) -> Call:
        memory_frames = 0 if self.memory is None else self.memory.frames
        if recache and self.generator.config.window.relative:  # even where the local frames are no more than a block
            memory_frames = 0
        return self.generator.geometry.call(start, frames, memory_frames=memory_frames, sink_ids=sink_ids)

    def _flow(self, x: Tensor, t: float, call: Call, *, output: bool = True) -> Tensor | None:
        g = self.generator
        memory = None if self.memory is None else self.memory.read(call)
        level = g.level(t, g.config.window.frames_per_block if self.image is not None else 0)
        flow = self._predict(x, level, call, memory, output=output)
        return None if flow is None else flow.to(x.dtype)

    def _predict(
        self, x: Tensor, level: Conditioning, call: Call, memory: list[KV] | None, *, output: bool
    ) -> Tensor | None:
        return self.generator.model(x, level, self.text, self.cache, call, memory, output=output)

    def _with_image(self, x: Tensor) -> Tensor:
        """``x`` with the given first frame in it, if there is one."""
        return x if self.image is None else torch.cat([self.image, x[:, 1:]], dim=1)

    def _step(self, x: Tensor, flow: Tensor, i: int, draw: Callable[[int], Tensor]) -> Tensor:
        g = self.generator
        t = g.timesteps[i]
        if i + 1 == len(g.timesteps):
            return g.schedule.to_x0(x, flow, t)
        after = g.timesteps[i + 1]
        if g.config.sampler.solver == "euler":
            return x + (g.schedule.sigma(after) - g.schedule.sigma(t)) * flow
        return g.schedule.add_noise(g.schedule.to_x0(x, flow, t), draw(i + 1), after)


def memory_part(named: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The memory's tensors of a saved stream, by their own names, on ``device``."""
    prefix = "memory."
    return {name.removeprefix(prefix): x.to(device) for name, x in named.items() if name.startswith(prefix)}
