"""Time the whole way from prompt to mp4, and what each of its two threads costs.

    python bench/path.py --blocks 100

One thread generates latents; the other decodes, converts and encodes the block before. Each thread's processor time
a block is printed beside the clock's: on cores that other programs use, the longer of the two is what free cores give.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import Recorder
from echo_infinity.video import VideoWriter, open_writer

PROMPT = "a red circle drifts over a dark field"
WARM = 10


class _Clocked:
    """A stream that notes the processor time of its two halves."""

    def __init__(self, stream) -> None:
        self._stream, self.generate, self.decode_ = stream, [], []

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def next_latents(self) -> torch.Tensor:
        begun = time.thread_time()
        latents = self._stream.next_latents()
        self.generate.append(time.thread_time() - begun)
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        begun = time.thread_time()
        frames = self._stream.decode(latents)
        self.decode_.append(time.thread_time() - begun)
        return frames


class _ClockedWriter:
    def __init__(self, writer: VideoWriter) -> None:
        self._writer, self.write_ = writer, []

    def __getattr__(self, name: str):
        return getattr(self._writer, name)

    def write(self, frames) -> None:
        begun = time.thread_time()
        self._writer.write(frames)
        self.write_.append(time.thread_time() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--threads", type=int, default=1, help="of each of the two threads' operations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = EchoPipeline.from_pretrained(args.model)
    height, width = pipe.size
    with tempfile.TemporaryDirectory() as folder:
        writer = _ClockedWriter(open_writer(Path(folder) / "out.mp4", width=width, height=height, fps=pipe.fps))
        stream = _Clocked(pipe.stream(PROMPT))
        ends: list[float] = []
        frames = 12 * (args.blocks + WARM) - 3
        with writer._writer:
            Recorder(stream, writer, target=frames, on_block=lambda n: ends.append(time.perf_counter())).run()
    steps = [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
    generate, decode, write = (statistics.median(x[WARM:]) for x in (stream.generate, stream.decode_, writer.write_))
    block = max(generate, decode + write)
    sys.stdout.write(
        f"clock: median block {statistics.median(steps) * 1e3:.1f} ms = {12 / statistics.median(steps):.0f} frames/s, "
        f"fastest tenth below {sorted(steps)[len(steps) // 10] * 1e3:.1f} ms, "
        f"whole run {12 * len(steps) / (ends[-1] - ends[WARM - 1]):.0f} frames/s\n"
        f"processor: generate {generate * 1e3:.1f} ms | decode {decode * 1e3:.1f} + mp4 {write * 1e3:.1f} ms; "
        f"side by side {block * 1e3:.1f} ms = {12 / block:.0f} frames/s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
