"""Error of eight-bit weights and caches over a rollout of the bundled model: relative root mean square by block.

python bench/fp8_error.py --blocks 20
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from echo_infinity.pipeline import EchoPipeline

PROMPT = "a red circle drifts over a dark field"
MODES = {
    "bfloat16": {},
    "fp8 weights": {"weights": "fp8"},
    "fp8 kv": {"kv": "fp8"},
    "both": {"weights": "fp8", "kv": "fp8"},
}


def rollout(blocks: int, dtype: torch.dtype, **options: str) -> torch.Tensor:
    """Latents ``(blocks, F, C, h, w)`` of the bundled model."""
    pipe = EchoPipeline.from_pretrained("tiny", dtype=dtype, **options)
    stream = pipe.stream(PROMPT, output_type="latents", seed=1)
    return torch.stack(list(itertools.islice(stream, blocks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact = rollout(args.blocks, torch.float32)
    for name, options in MODES.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        difference = rollout(args.blocks, dtype, **options) - exact
        by_block = difference.square().flatten(1).mean(1).sqrt() / exact.square().mean().sqrt()
        shown = " ".join(f"{x:.4f}" for x in by_block[[0, len(by_block) // 2, -1]])
        sys.stdout.write(f"{name:12} first, middle, last block: {shown}; all: {by_block.square().mean().sqrt():.4f}\n")


if __name__ == "__main__":
    main()
