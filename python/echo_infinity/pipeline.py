"""The way in: load a model, start, resume and collect streams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from echo_infinity.batch import StreamBatch
from echo_infinity.codec import TIME_STRIDE
from echo_infinity.engine import Engine
from echo_infinity.noise import Noise, counter_noise
from echo_infinity.parts import LatentsOnly, PartOptions
from echo_infinity.prompts import TimedPrompt
from echo_infinity.ranks import Ranks
from echo_infinity.rows import BatchSampler
from echo_infinity.settings import Callback, PromptChange, StreamSettings, frame_count
from echo_infinity.state import SavedStream, check_model, read_state, warn_differences
from echo_infinity.stream import Stream
from echo_infinity.weights import load_checkpoint


class EchoPipeline(Engine):
    """A text-to-video generator; any number of streams may run on it at the same time.

    Args:
        checkpoint: a generator's parts, from :func:`echo_infinity.weights.load_checkpoint`.
        source: where it came from; kept in saved streams, for the command line to find it again.
        parts: which text encoder and decoder were asked for; kept with the source.
        weights: "full", or "fp8" to keep the transformer's linear layers in e4m3.
        kv: "full", or "fp8" to keep cached keys and values in e4m3.
        ranks: processes that share the work of each stream, see :mod:`echo_infinity.parallel`.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str] = "tiny",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        relative_ids: bool | None = None,
        weights: str = "full",
        kv: str = "full",
        ranks: Ranks | None = None,
        **parts: Any,
    ) -> EchoPipeline:
        """Load a model.

        Args:
            name_or_folder: a bundled model's name or a checkpoint's folder.
            dtype: of model, memory and learned text; the codec stays float32.
            device: where everything runs.
            relative_ids: override the configuration's relative (True) or absolute (False) frame ids, as an ablation.
            weights: "fp8" keeps the transformer's linear layers in e4m3 (docs/precision.md has the error).
            kv: "fp8" keeps cached keys and values in e4m3.
            ranks: from :func:`echo_infinity.parallel.join_ranks`: all these processes share the work of each stream.
            parts: which text encoder and decoder, and how: fields of :class:`echo_infinity.parts.PartOptions`.

        Raises:
            ValueError: unknown name, impossible geometry, or missing, corrupt or truncated files; or heads or tokens
                can't be shared out among ``ranks``.
            FileNotFoundError: a checkpoint's file is missing.
            MissingExtraError: a part needs a library that is not installed.
        """
        checkpoint = load_checkpoint(name_or_folder, dtype=dtype, device=device, parts=PartOptions(**parts))
        if relative_ids is not None:
            window = replace(checkpoint.config.window, relative=relative_ids)
            checkpoint = checkpoint._replace(config=replace(checkpoint.config, window=window))
        source = os.path.abspath(name_or_folder) if os.path.isdir(name_or_folder) else os.fspath(name_or_folder)
        kept = {name: str(x).removeprefix("torch.") for name, x in parts.items() if x is not None}
        if "text" in kept:
            kept["text"] = os.path.abspath(kept["text"])
        kept |= {name: mode for name, mode in (("weights", weights), ("kv", kv)) if mode != "full"}
        return cls(checkpoint, source, kept, weights=weights, kv=kv, ranks=ranks)

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        schedule: Sequence[TimedPrompt] = (),
        image: Tensor | None = None,
        noise: Noise | None = None,
        memory: str | None = None,
        memory_dtype: torch.dtype | None = None,
        output_type: str = "pixels",
        callback: Callback | None = None,
        autosave: str | os.PathLike[str] | None = None,
        autosave_every: float = 60.0,
    ) -> Stream:
        """Start a stream.

        Args:
            prompt: what to show.
            seed: of the noise, 0 .. 2**63 - 1.
            schedule: prompts that follow, in order of time; see :mod:`echo_infinity.prompts`.
            image: ``(H, W, 3)`` uint8, the first frame, from which the first block is generated; see
                :func:`echo_infinity.image.load_image`.
            noise: the caller's own noise instead, see :mod:`echo_infinity.noise`; give it again to :meth:`resume`.
            memory: "on" (what the model was trained with), "off" (window and sink only) or "frozen" (never written
                after its learned start); default "on" where the model keeps anything.
            memory_dtype: of the memory state; default the weights'.
            output_type: "pixels" or "latents".
            callback: called as ``callback(stream, block_index, output)`` after each block.
            autosave: file to save the stream to at block boundaries.
            autosave_every: seconds between saves.

        Raises:
            ValueError: an empty or too long prompt, a seed out of range, an unknown option, memory asked of a model
                without one, or an image of one that was not trained to start from it.
        """
        memory = memory or ("on" if self.remembers else "off")
        settings = StreamSettings(
            seed, noise, memory, memory_dtype, output_type, callback, autosave, autosave_every
        )  # fmt: skip
        self._check_request(settings, schedule)
        stream = Stream(self, PromptChange(prompt, 0), settings)
        stream.schedule.extend(schedule)
        if image is not None:
            stream.start_from(image)
        return stream

    def batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        schedule: Sequence[TimedPrompt] = (),
        images: Sequence[Tensor] | None = None,
        memory: str | None = None,
        memory_dtype: torch.dtype | None = None,
        output_type: str = "pixels",
        callback: Callback | None = None,
    ) -> StreamBatch:
        """Start streams that advance in step, one for each prompt and its seed.

        Args:
            prompts: what each is to show.
            seeds: of their noise.
            schedule: prompts that follow in all of them.
            images: the first frame of each.
            memory: as in :meth:`stream`, like the rest.
            memory_dtype: as in :meth:`stream`.
            output_type: as in :meth:`stream`.
            callback: as in :meth:`stream`.

        Raises:
            ValueError: other numbers of prompts, seeds and images, or none; several processes; or as :meth:`stream`.
        """
        if not prompts or len(prompts) != len(seeds) or (images is not None and len(images) != len(prompts)):
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds" + (f", {len(images)} images" if images else "")
            raise ValueError(f"a batch needs a prompt and a seed for each stream, got {counts}")
        memory = memory or ("on" if self.remembers else "off")
        settings = [StreamSettings(s, None, memory, memory_dtype, output_type, callback) for s in seeds]
        self._check_request(settings[0], schedule)
        batch = self._batch([PromptChange(prompt, 0) for prompt in prompts], settings)
        for row, stream in enumerate(batch.streams):
            stream.schedule.extend(schedule)
            if images is not None:
                stream.start_from(images[row])
        return batch

    def resume_batch(self, saved: Sequence[str | os.PathLike[str] | SavedStream]) -> StreamBatch:
        """Go on with saved streams in step; they must stand at the same block.

        Raises:
            ValueError: different blocks or kinds of streams, or as :meth:`resume`.
            FileNotFoundError: there is no such file.

        Warns:
            ResumeWarning: as :meth:`resume`.
        """
        if not saved:
            raise ValueError("there is no saved stream to go on with")
        read = [x if isinstance(x, SavedStream) else read_state(x) for x in saved]
        settings = [self._saved_settings(x) for x in read]
        if any(replace(s, seed=0) != replace(settings[0], seed=0) for s in settings):
            raise ValueError("the streams differ in memory or output: resume them one at a time")
        batch = self._batch([PromptChange(**x.meta["prompts"][-1]) for x in read], settings)
        for stream, x in zip(batch.streams, read, strict=True):
            stream.restore(x)
        return batch

    def resume(
        self,
        saved: str | os.PathLike[str] | SavedStream,
        *,
        noise: Noise | None = None,
        output_type: str | None = None,
        callback: Callback | None = None,
        autosave: str | os.PathLike[str] | None = None,
        autosave_every: float = 60.0,
    ) -> Stream:
        """Go on with a saved stream: bit for bit on the same device, torch, dtype and thread count.

        Args:
            saved: the file, or what :func:`echo_infinity.state.read_state` read.
            noise: needed again where the stream ran with the caller's own.
            output_type: default as saved; "latents" may follow "pixels", not the other way round.
            callback: as in :meth:`stream`.
            autosave: as in :meth:`stream`.
            autosave_every: as in :meth:`stream`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is corrupt, from a newer version, other weights or another configuration, or the
                caller's noise is missing.

        Warns:
            ResumeWarning: device, torch, dtype or threads differ, so the last bits may too.
        """
        saved = saved if isinstance(saved, SavedStream) else read_state(saved)
        settings = self._saved_settings(saved, noise, output_type, callback, autosave, autosave_every)
        stream = Stream(self, PromptChange(**saved.meta["prompts"][-1]), settings)
        stream.restore(saved)
        return stream

    def _batch(self, prompts: Sequence[PromptChange], settings: Sequence[StreamSettings]) -> StreamBatch:
        if self.lead is not None:
            raise ValueError("a batch runs on one process: start it without torchrun, or each stream by itself")
        generator = self.generator(settings[0].memory)
        texts = [self.encode_prompt(change.prompt) for change in prompts]
        sampler = BatchSampler(generator, texts, [counter_noise(s.seed) for s in settings], settings[0].memory_dtype)
        rows = zip(prompts, settings, sampler.rows(), strict=True)
        return StreamBatch(sampler, [Stream(self, change, s, row) for change, s, row in rows])

    def _check_request(self, settings: StreamSettings, schedule: Sequence[TimedPrompt]) -> None:
        if settings.output_type == "pixels" and isinstance(self.codec, LatentsOnly):
            raise ValueError(self.codec.reason)
        self.check_prompts(schedule)

    def _saved_settings(
        self,
        saved: SavedStream,
        noise: Noise | None = None,
        output_type: str | None = None,
        callback: Callback | None = None,
        autosave: str | os.PathLike[str] | None = None,
        autosave_every: float = 60.0,
    ) -> StreamSettings:
        """Check that a saved stream can go on here; return its settings."""
        check_model(saved, self.config.to_json(), self.fingerprint)
        meta = saved.meta
        if (meta["noise"] == "injected") != (noise is not None):
            raise ValueError(
                f"{saved.path} ran with the caller's own noise: pass the same noise= to resume it"
                if noise is None
                else f"{saved.path} ran with the noise of seed {meta['seed']}: resume it without noise="
            )
        if meta["output_type"] == "latents" and output_type == "pixels":
            raise ValueError(f"{saved.path} ran with output_type 'latents' and holds no decoder state: resume it so")
        warn_differences(saved, self.environment())
        dtype = None if meta["memory_dtype"] is None else getattr(torch, meta["memory_dtype"])
        output_type = output_type or meta["output_type"]
        return StreamSettings(
            meta["seed"], noise, meta["memory"], dtype, output_type, callback, autosave, autosave_every
        )  # fmt: skip

    def generate(
        self, prompt: str, *, seconds: float | None = None, frames: int | None = None, **options: Any
    ) -> Tensor:
        """Return a video of exactly this length.

        Args:
            prompt: what to show.
            seconds: length; rounded to whole frames.
            frames: length in pixel frames instead.
            options: of :meth:`stream`.

        Returns:
            ``(N, H, W, 3)`` uint8, or the latents ``(F, C, h, w)`` float32 that cover the length.

        Raises:
            ValueError: no positive length, or both; or as :meth:`stream`.
        """
        if (seconds is None) == (frames is None):
            raise ValueError(f"give either seconds or frames, got {seconds} and {frames}")
        count = frames if frames is not None else frame_count(seconds or 0.0, self.fps)
        if count < 1:
            raise ValueError(f"frames must be at least 1, got {count}")
        outputs = []
        with self.stream(prompt, **options) as stream:
            while stream.frames < count:
                outputs.append(next(stream))
            latents = stream.settings.output_type == "latents"
        return torch.cat(outputs)[: -(-(count - 1) // TIME_STRIDE) + 1 if latents else count]
