"""What an actor of a fleet holds: a model and the streams that run on it; nothing here needs Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echo_infinity.pipeline import EchoPipeline
from echo_infinity.stream import Stream


class LostStreamError(RuntimeError):
    """A host does not hold the stream that it is asked for: it has been started again since."""


class Switch(NamedTuple):
    """A change of prompt, before block ``block``."""

    block: int
    prompt: str
    options: dict[str, Any]


class StreamHost:
    """A model and the streams that run on it.

    Args:
        model: as in :meth:`EchoPipeline.from_pretrained`, with its ``options``.
        threads: of the CPU; the same on every host, or streams that move change in their last bits.
    """

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        self._pipe = EchoPipeline.from_pretrained(model, **options)
        self._streams: dict[str, Stream] = {}

    def process(self) -> int:
        """Return the number of the process that the host runs in."""
        return os.getpid()

    def ready(self) -> int:
        """Return the number of streams; answers when the model is loaded."""
        return len(self._streams)

    def start(self, name: str, prompt: str, options: dict[str, Any]) -> None:
        """Start a stream, in place of one of that name."""
        self._streams[name] = self._pipe.stream(prompt, **options)

    def resume(self, name: str, path: Path, options: dict[str, Any]) -> None:
        """Go on with a saved stream."""
        self._streams[name] = self._pipe.resume(path, **options)

    def replay(self, name: str, until: int, switches: list[Switch]) -> None:
        """Make again what the stream had made when its host was lost, up to block ``until``."""
        stream = self._stream(name)
        for block in range(stream.block, until + 1):
            for switch in switches:
                if switch.block == block:
                    stream.switch(switch.prompt, **switch.options)
            if block < until:
                next(stream)

    def advance(self, name: str, blocks: int) -> Tensor:
        """Return the next blocks, joined; all or none, so that the fleet knows how far the stream is."""
        stream = self._stream(name)
        before = stream.block
        try:
            return torch.cat([next(stream) for _ in range(blocks)])
        except Exception:
            if stream.block != before:  # the fleet makes it anew from its last save
                del self._streams[name]
            raise

    def switch(self, name: str, prompt: str, options: dict[str, Any]) -> None:
        """Change the prompt at the next block."""
        self._stream(name).switch(prompt, **options)

    def save(self, name: str, path: Path) -> None:
        """Save the stream."""
        self._stream(name).save(path)

    def stop(self, name: str) -> None:
        """Close the stream and forget it."""
        self._stream(name).close()
        del self._streams[name]

    def _stream(self, name: str) -> Stream:
        if name not in self._streams:
            raise LostStreamError(f"no stream {name!r} on this host")
        return self._streams[name]
