"""Time the engine against the naive loop it has to beat, waste by waste, in one run on one machine.

    python bench/baseline.py --blocks 5 --dtype both --threads 2
    python bench/baseline.py --device cuda --geometry official --dtype bf16

Blocks of all loops take turns, so that a noisy neighbour hits each of them alike; CPU seconds stand beside the
clock's, since they leave out the time others had the cores, and beside them their part in the operating system: page
faults, where large temporary tensors go back to the system and are cleared again. Prints a table and writes JSON to
bench/results/. Set OMP_WAIT_POLICY=PASSIVE, or waiting threads count as work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from clock import idle
from echo_infinity.config import EchoConfig, ModelConfig, WindowConfig, preset
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from naive import WASTES, NaiveSampler
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
WARM_BLOCKS = 7  # fills the window, saturates the ids, and times nothing of the first blocks

GRAPH_BLOCKS = 7  # until the engine's graphs are captured, on a GPU
_COLUMNS = {"ratio": 2, "cpu": 3, "system": 3, "cpu_ratio": 2}  # digits after the point

GEOMETRIES = {
    "official": preset("wan2.1-1.3b"),
    "baseline": EchoConfig(
        name="baseline",
        model=ModelConfig(width=384, heads=6, layers=8, ffn=2240, latent_channels=16, text_tokens=512, text_width=1024),
        latent_rows=26,
        latent_columns=40,
        memory=MemoryConfig(width=384, heads=6, frames=3, tokens_per_frame=260),
    ),
    "small": EchoConfig(
        name="small",
        model=ModelConfig(width=96, heads=2, layers=2, ffn=192, latent_channels=4, text_tokens=16, text_width=32),
        latent_rows=8,
        latent_columns=8,
        window=WindowConfig(),
        memory=MemoryConfig(width=96, heads=2, frames=3, tokens_per_frame=16),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write; returns the exit status."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    config = GEOMETRIES[args.geometry]
    named = {"off": [], **{name: [name] for name in WASTES}, "all": list(WASTES)}
    loops = {name: named[name] for name in args.switch or named}
    commit, load = _git("rev-parse", "--short", "HEAD"), _load()
    results = {name: measure(config, DTYPES[name], loops, args.blocks, args.device) for name in args.dtype}
    report = {
        "commit": commit,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "load_average": {"before": load, "after": _load()},
        "geometry": args.geometry,
        "blocks": args.blocks,
        "seconds_per_block": results,
    }
    sys.stdout.write(table(report) + "\n")
    chip = report["cpu"] if args.device == "cpu" else report["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{date.today()}-{slug}-baseline.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


@torch.inference_mode()
def measure(
    config: EchoConfig, dtype: torch.dtype, loops: dict[str, list[str]], blocks: int, device: str = "cpu"
) -> dict[str, dict]:
    """Time ``blocks`` steady blocks of the engine and of each loop, taking turns.

    Args:
        config: geometry; weights are random.
        dtype: of weights, keys and values.
        loops: wastes of each naive loop, by the loop's name.
        blocks: timed blocks of each.
        device: "cpu" or "cuda"; on a GPU the engine replays its graphs, and the clock waits for the device.

    Returns:
        By name, the engine's as ``"engine"``: ``median``, ``min``, ``max`` seconds, ``cpu`` the median of CPU seconds
        over all threads, ``system`` of those in the operating system, all ``times`` as triples of these, ``ratio`` and
        ``cpu_ratio`` of the medians to the engine's, and ``difference``, the first block's largest distance from the
        engine's relative to that block's largest value.
    """
    torch.manual_seed(0)
    model = CausalDiT(config.model).to(device, dtype).eval()
    memory = None if config.memory is None else EvolvingMemory(config.memory).to(device, dtype)
    generator = Generator(config, model, memory)
    embeddings = torch.randn(1, config.model.text_tokens, config.model.text_width).to(device, dtype)
    samplers: dict[str, BlockSampler] = {
        "engine": BlockSampler(generator, model.encode_text(embeddings), counter_noise(0))
    }
    for name, wastes in loops.items():
        samplers[name] = NaiveSampler(generator, embeddings, wastes, video_blocks=WARM_BLOCKS + 1 + blocks)
    given = torch.randn(WARM_BLOCKS, *samplers["engine"].window[:, : config.window.frames_per_block].shape).to(device)
    for sampler in samplers.values():
        for latents in given:
            sampler.observe(latents)
    first = {name: sampler.next_block() for name, sampler in samplers.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in samplers}
    names = list(samplers)
    for _ in range(GRAPH_BLOCKS if device == "cuda" else 0):
        samplers["engine"].next_block()
    for turn in range(blocks):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
            idle(device)
            start = _clocks()
            samplers[name].next_block()
            idle(device)
            wall, cpu, system = (after - before for before, after in zip(start, _clocks(), strict=True))
            times[name].append((wall, cpu, system))
    return {name: _summary(times[name], times["engine"], first[name], first["engine"]) for name in samplers}


def _clocks() -> tuple[float, float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_stime


def _summary(
    times: list[tuple[float, float, float]], engine: list[tuple[float, float, float]], block: Tensor, expected: Tensor
) -> dict:
    wall, cpu, system = (statistics.median(x) for x in zip(*times, strict=True))
    engine_wall, engine_cpu, _ = (statistics.median(x) for x in zip(*engine, strict=True))
    return {
        "median": wall,
        "min": min(times)[0],
        "max": max(times)[0],
        "cpu": cpu,
        "system": system,
        "times": times,
        "ratio": wall / engine_wall,
        "cpu_ratio": cpu / engine_cpu,
        "difference": ((block - expected).abs().max() / expected.abs().max()).item(),
    }


def table(report: dict) -> str:
    """The report as a Markdown table."""
    results = report["seconds_per_block"]
    before, after = report["load_average"]["before"], report["load_average"]["after"]
    lines = [
        f"{report['device']}, {report['cpu']}, {report['threads']} threads, torch {report['torch']}, "
        f"commit {report['commit']}, geometry {report['geometry']}, "
        f"median (min-max) of {report['blocks']} steady blocks, load average {before} before, {after} after",
        "",
        "| loop | "
        + " | ".join(f"{d} s/block | / engine | CPU s | in system | / engine | difference" for d in results)
        + " |",
        "|---|" + "---|" * (6 * len(results)),
    ]
    for name in next(iter(results.values())):
        cells = []
        for rows in results.values():
            row = rows[name]
            cells.append(f"{row['median']:.3f} ({row['min']:.3f}-{row['max']:.3f})")
            cells += [f"{row[key]:.{digits}f}" for key, digits in _COLUMNS.items()]
            cells.append(f"{row['difference']:.1e}")
        lines.append(f"| {_title(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _title(name: str) -> str:
    known = {"engine": "engine", "off": "naive loop, all switches off", "all": "naive loop, all on"}
    return known.get(name) or f"{name}: {WASTES[name]}"


def cpu_name() -> str:
    """Model name of this machine's CPU, with the matrix and vector extensions that decide bf16 speed."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.split(r"\s*: ", line, maxsplit=1) for line in info.read_text().splitlines() if ": " in line)
    flags = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return f"{fields.get('model name', platform.machine())} ({', '.join([family, *flags])})"


def _load() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each loop (default 5)")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="baseline")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--switch", nargs="+", choices=["off", *WASTES, "all"], help="only these loops")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/<date>-<cpu>-baseline.json)")
    args = parser.parse_args(arguments)
    args.dtype = list(DTYPES) if args.dtype == "both" else [args.dtype]
    return args


if __name__ == "__main__":
    sys.exit(main())
