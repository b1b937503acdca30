"""A loaded model: what streams of every kind ask of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from echo_infinity.cache import KV
from echo_infinity.codec import SPACE_STRIDE
from echo_infinity.fp8 import MODES, Fp8Linear, narrow_weights
from echo_infinity.generator import Generator
from echo_infinity.noise import Noise
from echo_infinity.parallel.lead import Lead
from echo_infinity.parallel.split import Split
from echo_infinity.policies import POLICIES, make_generator
from echo_infinity.prompts import TimedPrompt
from echo_infinity.ranks import Ranks
from echo_infinity.sampler import BlockSampler
from echo_infinity.state import environment
from echo_infinity.weights import Checkpoint


class Engine:
    """A generator, its text encoder and its codec on a device; :class:`EchoPipeline` says what the arguments are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: str | None = None,
        parts: Mapping[str, str] | None = None,
        *,
        weights: str = "full",
        kv: str = "full",
        ranks: Ranks | None = None,
    ) -> None:
        for name, mode in (("weights", weights), ("kv", kv)):
            if mode not in MODES:
                raise ValueError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")
        self.config, self.fingerprint, self.source = checkpoint.config, checkpoint.fingerprint, source
        self.parts = dict(parts or {})
        self.model, self.memory, self.codec = checkpoint.model, checkpoint.memory, checkpoint.codec
        self._text, self._checkpoint = checkpoint.text, checkpoint
        parameter = next(self.model.parameters())
        self.device, self.dtype, self.weights, self.kv = parameter.device, parameter.dtype, weights, kv
        if weights == "fp8":
            narrow_weights(self.model)  # in place: the checkpoint's own
        elif any(isinstance(x, Fp8Linear) for x in self.model.modules()):
            raise ValueError("another pipeline narrowed this checkpoint's weights to fp8: load it again")
        self._generators: dict[str, Generator] = {}
        several = ranks is not None and ranks.mesh is not None
        self.lead = Lead(Split(self.config, ranks)) if several and ranks is not None else None

    def environment(self) -> dict[str, Any]:
        """Return what a bit-exact continuation needs beside weights and configuration."""
        found = environment(self.device, self.dtype)
        narrowed = [name for name, mode in (("weights", self.weights), ("kv", self.kv)) if mode == "fp8"]
        processes = 1 if self.lead is None else self.lead.split.world
        dtype = f"{found['dtype']}, fp8 {' and '.join(narrowed)}" if narrowed else found["dtype"]
        return {**found, "dtype": dtype, "processes": processes}

    @property
    def fps(self) -> int:
        """Frames a second."""
        return self.config.fps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return self.config.latent_rows * SPACE_STRIDE, self.config.latent_columns * SPACE_STRIDE

    def meta(self) -> dict[str, Any]:
        """Return what a saved stream keeps of the model, as JSON values."""
        return {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.fingerprint,
            "source": self.source,
            "parts": self.parts,
            "environment": self.environment(),
        }

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> list[KV]:
        """Return each layer's cross-attention K/V of a prompt.

        Raises:
            ValueError: empty, too long, or without a known word.
        """
        return self.model.encode_text(self._text.encode([prompt]))

    def check_prompts(self, schedule: Sequence[TimedPrompt]) -> None:
        """Refuse now what would fail when its time has come.

        Raises:
            ValueError: a prompt is empty, too long, or without a known word.
        """
        for later in schedule:
            self._text.encode([later.prompt])

    def sampler(
        self, memory: str, text: list[KV], noise: Noise, memory_dtype: torch.dtype | None = None
    ) -> BlockSampler:
        """Start a stream's sampler, on all processes where there are several.

        Raises:
            ValueError: memory asked of a model without one, or this is not the first process.
            ProcessesError: another process failed or ended.
        """
        if self.lead is not None:
            return self.lead.sampler(self, memory, text, noise, memory_dtype)
        return BlockSampler(self.generator(memory), text, noise, memory_dtype=memory_dtype)

    def generator(self, memory: str) -> Generator:
        """Return what the streams with this memory ("on", "off", "frozen") share.

        Raises:
            ValueError: memory asked of a model without one.
        """
        if (memory == "on" and not self.remembers) or (memory == "frozen" and self.memory is None):
            raise ValueError(f"memory is {memory!r} but the model {self.config.name} has none: use 'off'")
        if memory not in self._generators:
            self._generators[memory] = self._make_generator(memory)
        return self._generators[memory]

    @property
    def remembers(self) -> bool:
        """Whether the model keeps anything of the frames that left its window."""
        return self.memory is not None or self.config.policy not in ("evolving", "window", "sink")

    def _make_generator(self, memory: str) -> Generator:
        if memory == "on":
            return make_generator(self._checkpoint, kv=self.kv)
        kept = POLICIES["frozen" if memory == "frozen" else "sink"]
        return Generator(self.config, self.model, kept.module(self.memory), kept.recall, kv=self.kv)
