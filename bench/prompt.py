"""Count how often one prompt is kept: in how many blocks of many seeds' videos every named colour shows.

    python bench/prompt.py "a red circle drifts over a dark field" --seeds 16 --seconds 60

The last frame of every block is judged. ``echo-infinity eval prompt`` judges many prompts, and shapes, too.
"""

from __future__ import annotations

import argparse
import math

import torch
from echo_infinity.codec import to_uint8
from echo_infinity.evaluation.prompt import judge_frame
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler, Generator
from echo_infinity.weights import load_checkpoint
from tqdm import tqdm


@torch.inference_mode()
def kept(model: str, prompt: str, seeds: int, seconds: float) -> list[float]:
    """Return each block's share of seeds in whose last frame every colour that ``prompt`` names shows."""
    loaded = load_checkpoint(model)
    config = loaded.config
    text = loaded.model.encode_text(loaded.text.encode([prompt] * seeds))
    sampler = BlockSampler(Generator(config, loaded.model, loaded.memory), text, counter_noise(0), seeds)
    shares, state = [], None
    for _ in tqdm(range(math.ceil(seconds * config.fps / (4 * config.window.frames_per_block))), desc="blocks"):
        pixels, state = loaded.codec.decode(sampler.next_block(), state)
        shares.append(sum(judge_frame(prompt, frame).colours for frame in to_uint8(pixels[:, -1])) / seeds)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="a red circle drifts over a dark field")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    shares = kept(args.model, args.prompt, args.seeds, args.seconds)
    tail = shares[-max(1, len(shares) // 8) :]
    whole, end = sum(shares) / len(shares), sum(tail) / len(tail)
    print(f"every named colour shows in {whole:.1%} of blocks, {end:.1%} at the end")  # noqa: T201


if __name__ == "__main__":
    main()
