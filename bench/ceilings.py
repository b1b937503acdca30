"""Measure what the card itself can do: a large copy and large matrix products; every roofline is against these.

python bench/ceilings.py --json ceilings.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def seconds(run: Callable[[], object], rounds: int = 20) -> list[float]:
    """Time ``run`` on the current device with events, a call at a time, warmed up; ``rounds`` values in seconds."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def measure() -> dict[str, float | str]:
    """Return the card's name, its state, GB/s of a copy (read plus written) and TFLOP/s of products by dtype."""
    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, float | str] = {
        "device": properties.name,
        "torch": torch.__version__,
        "multiprocessors": properties.multi_processor_count,
        "L2_MiB": properties.L2_cache_size >> 20,
    }
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)  # 2 GiB, far more than any cache
    target = torch.empty_like(source)
    copies = seconds(lambda a=target, b=source: a.copy_(b))
    found["copy_GB/s"] = 2 * source.numel() * 4 / statistics.median(copies) / 1e9
    found["copy_spread"] = max(copies) / min(copies)
    del source, target
    for dtype, n in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        times = seconds(lambda a=a, b=b: a @ b)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_TFLOP/s"] = 2 * n**3 / statistics.median(times) / 1e12
    found["state"] = _state()
    return found


def _state() -> str:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi did not answer"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU: this torch sees no CUDA device\n")
        return 2
    found = measure()
    sys.stdout.write("\n".join(f"{name}: {value}" for name, value in found.items()) + "\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
