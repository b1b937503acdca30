"""Cost: time a block, with and without the decoder, and the bytes of state that a stream holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from echo_infinity.evaluation.journal import Journal, Row
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.state import environment
from echo_infinity.weights import Checkpoint


@dataclass(frozen=True)
class CostTest:
    """What is timed.

    Args:
        blocks: timed, once the window and the memory are full.
        prompt: of the stream.

    Raises:
        ValueError: no block.
    """

    blocks: int = 100
    prompt: str = "a red circle drifts over a dark field"

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"cost needs at least 1 block, got {self.blocks}")

    def settings(self) -> Row:
        """What the figures depend on beside the machine, which each row names."""
        return {"prompt": self.prompt}


@dataclass(frozen=True)
class Cost:
    """Figures of one stream on one machine; milliseconds a block as median, 10 % and 90 % quantile."""

    machine: str
    blocks: int
    generate: tuple[float, float, float]
    decode: tuple[float, float, float]
    frames_per_second: float  # of generating and decoding in turn
    cache_bytes: int
    memory_bytes: int
    other_bytes: int


class Timing:
    """The judge of one model and policy, a single stream.

    Args:
        checkpoint: the model.
        policy: what it does with evicted frames.
        test: what is timed.
    """

    def __init__(self, checkpoint: Checkpoint, policy: str, test: CostTest) -> None:
        self.checkpoint, self.policy, self.test = checkpoint, policy, test

    def steps(self) -> int:
        """How often :meth:`run` reports progress: once a block."""
        return self.test.blocks

    def blocks(self) -> int:
        """Blocks of the stream, those that fill the window among them."""
        w = self.checkpoint.config.window
        return self.test.blocks + w.window_frames // w.frames_per_block + 4

    def run(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Time the blocks, unless the journal has a row of this machine and number of blocks."""
        machine = self._machine()
        if any(row["machine"] == machine and row["blocks"] == self.test.blocks for row in journal.rows):
            progress(self.test.blocks)
            return
        rollout = Rollout(self.checkpoint, self.policy, [self.test.prompt], [0])
        for _ in range(self.blocks() - self.test.blocks):
            rollout.next_block()
        generate, both, frames = [], [], 0
        for _ in range(self.test.blocks):
            began = self._now()
            latents = rollout.sampler.next_block()
            generated = self._now()
            frames += rollout.decode(latents).shape[1]
            both.append(self._now() - began)
            generate.append(generated - began)
            progress(1)
        sizes = {name: x.numel() * x.element_size() for name, x in rollout.tensors().items()}
        cache = sum(n for name, n in sizes.items() if name.startswith("sampler.cache."))
        memory = sum(n for name, n in sizes.items() if name.startswith("sampler.memory."))
        row = {
            "machine": machine,
            "blocks": self.test.blocks,
            "generate": generate,
            "decode": [b - g for b, g in zip(both, generate, strict=True)],
            "frames": frames,
            "cache_bytes": cache,
            "memory_bytes": memory,
            "other_bytes": sum(sizes.values()) - cache - memory,
        }
        journal.append([row])

    def _machine(self) -> str:
        parameter = next(self.checkpoint.model.parameters())
        about = environment(parameter.device, parameter.dtype)
        return f"{about['device']}, torch {about['torch']}, {about['dtype']}, {about['threads']} threads"

    def _now(self) -> float:
        device = next(self.checkpoint.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def costs(rows: Iterable[Row]) -> list[Cost]:
    """Sum up a journal's rows, one a machine and length."""
    return [
        Cost(
            row["machine"],
            row["blocks"],
            _quantiles(row["generate"]),
            _quantiles(row["decode"]),
            row["frames"] / (sum(row["generate"]) + sum(row["decode"])),
            row["cache_bytes"],
            row["memory_bytes"],
            row["other_bytes"],
        )
        for row in rows
    ]


def _quantiles(seconds: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.percentile(np.array(seconds) * 1000, [10, 50, 90])
    return float(middle), float(low), float(high)
