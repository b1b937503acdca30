"""What a stream is asked for: its prompts and its settings, checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from echo_infinity.noise import Noise, check_seed

if TYPE_CHECKING:
    from echo_infinity.stream import Stream

OUTPUTS = ("pixels", "latents")
MEMORIES = ("on", "off", "frozen")
Callback = Callable[["Stream", int, Tensor], Any]
"""``callback(stream, block_index, output)``, called after each block; it may switch the prompt, save or close."""


@dataclass(frozen=True)
class PromptChange:
    """A prompt and the block at which it took effect; ``cut`` where a new shot began with it."""

    prompt: str
    block: int
    global_sink: bool = True
    memory_recache: bool = False
    cut: bool = False


@dataclass(frozen=True)
class StreamSettings:
    """What a stream keeps for its whole life; see :meth:`EchoPipeline.stream`."""

    seed: int = 0
    noise: Noise | None = None
    memory: str = "on"
    memory_dtype: torch.dtype | None = None
    output_type: str = "pixels"
    callback: Callback | None = None
    autosave: str | os.PathLike[str] | None = None
    autosave_every: float = 60.0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, choices in (("output_type", OUTPUTS), ("memory", MEMORIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.autosave_every >= 0:
            raise ValueError(f"autosave_every is seconds >= 0, got {self.autosave_every}")

    def meta(self) -> dict[str, Any]:
        """Return what a saved stream keeps of them, as JSON values."""
        return {
            "seed": self.seed,
            "noise": "counter" if self.noise is None else "injected",
            "memory": self.memory,
            "memory_dtype": None if self.memory_dtype is None else str(self.memory_dtype).removeprefix("torch."),
            "output_type": self.output_type,
        }


def frame_count(seconds: float, fps: int) -> int:
    """Return the number of frames of a length.

    Raises:
        ValueError: not a positive, finite number of seconds, or less than a frame.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"the length must be a positive number of seconds, got {seconds}")
    frames = round(seconds * fps)
    if frames < 1:
        raise ValueError(f"{seconds} seconds are less than a frame at {fps} frames a second; ask for more")
    return frames
