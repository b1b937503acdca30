"""Run one stream for thousands of blocks and show that neither its memory nor its time a block grows.

    python bench/soak.py --blocks 10000 -o runs/soak

Writes ``soak.csv`` (a row every 50 blocks: memory, time of a block, and the time of a fixed matrix product, which tells
a slow machine from a slow stream) and ``soak.png``, and exits 1 if memory grew by more than 1 % after the warm-up or
the time of a block by more than 2 % beyond the matrix product's.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.record import resident_bytes
from echo_infinity.stream import Stream

PROMPT = "a red circle drifts over a dark field"
EVERY = 50
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
MAX_GROWTH, MAX_SLOWDOWN = 1.01, 1.02


@dataclass(frozen=True)
class Trace:
    """Seconds of each block and of the matrix product after it; memory in bytes every ``EVERY`` blocks."""

    block: Sequence[float]
    product: Sequence[float]
    memory: Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """Ratios of the end to the start, after the warm-up."""

    growth: float
    slowdown: float  # of a block, over that of the matrix product
    raw_slowdown: float
    product_slowdown: float

    @property
    def ok(self) -> bool:
        return self.growth <= MAX_GROWTH and self.slowdown <= MAX_SLOWDOWN


def soak(stream: Stream, blocks: int, clock: Callable[[], float] = time.perf_counter) -> Trace:
    """Take ``blocks`` blocks of a stream, timing each and a matrix product beside it."""
    # Buffers as long as the run would look like a leak if they grew with it.
    block, product = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64)
    memory = torch.zeros(blocks // EVERY, dtype=torch.int64)
    a = torch.rand(512, 512)
    for i in range(blocks):
        begun = clock()
        next(stream)
        done = clock()
        a @ a
        product[i] = clock() - done
        block[i] = done - begun
        if (i + 1) % EVERY == 0:
            memory[i // EVERY] = resident_bytes()
    return Trace(block.tolist(), product.tolist(), memory.tolist())


def judge(trace: Trace, warmup: int, span: int) -> Verdict:
    """Compare the last ``span`` blocks with the first ``span`` after ``warmup``."""
    if warmup + 2 * span > len(trace.block):
        raise ValueError(f"{len(trace.block)} blocks are too few for a warm-up of {warmup} and two spans of {span}")

    def ratio(times: Sequence[float]) -> float:
        return statistics.median(times[-span:]) / statistics.median(times[warmup : warmup + span])

    block, product = ratio(trace.block), ratio(trace.product)
    growth = max(trace.memory[-(span // EVERY) :]) / trace.memory[warmup // EVERY]
    return Verdict(growth, block / product, block, product)


def write(trace: Trace, folder: Path) -> None:
    """Write the trace as CSV and as a plot."""
    from matplotlib.figure import Figure

    rows = []
    for i, memory in enumerate(trace.memory):
        part = slice(i * EVERY, (i + 1) * EVERY)
        times = [statistics.median(x[part]) * 1e3 for x in (trace.block, trace.product)]
        rows.append([(i + 1) * EVERY, memory / 2**20, *times])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "soak.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["block", "memory_mib", "block_ms", "product_ms"])
        table.writerows([n, f"{m:.2f}", f"{b:.3f}", f"{p:.4f}"] for n, m, b, p in rows)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    names = ("memory, MiB", "block, ms", "matrix product, ms")
    for k, (axis, name) in enumerate(zip(axes, names, strict=True), 1):
        axis.plot([row[0] for row in rows], [row[k] for row in rows], linewidth=0.8)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("block")
    figure.savefig(folder / "soak.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--span", type=int, default=1000, help="blocks at either end that are compared")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pixels", action="store_true", help="decode the latents too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu where other programs take turns on the cores"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = EchoPipeline.from_pretrained(args.model).stream(PROMPT, output_type="pixels" if args.pixels else "latents")
    trace = soak(stream, args.blocks, CLOCKS[args.clock])
    write(trace, args.out)
    verdict = judge(trace, args.warmup, args.span)
    sys.stdout.write(
        f"memory after {args.blocks} blocks over after {args.warmup}: {verdict.growth:.4f} (at most {MAX_GROWTH})\n"
        f"time of the last {args.span} blocks over the first {args.span} after that: {verdict.raw_slowdown:.4f}, "
        f"of the matrix product {verdict.product_slowdown:.4f}, "
        f"quotient {verdict.slowdown:.4f} (at most {MAX_SLOWDOWN})\n"
        f"median block {statistics.median(trace.block) * 1e3:.1f} ms; trace in {args.out}\n"
    )
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
