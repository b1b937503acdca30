"""Count how often one prompt is kept: in how many blocks of many seeds' videos every named colour shows.

    python bench/prompt.py "a red circle drifts over a dark field" --seeds 16 --seconds 60
    python bench/prompt.py --steps 6 --shift 3

The last frame of every block is judged. ``echo-infinity eval prompt`` judges many prompts, and shapes, too.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from echo_infinity.evaluation.prompt import judge_frame
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.weights import Checkpoint, load_checkpoint
from tqdm import tqdm


def kept(model: Checkpoint, prompt: str, seeds: int, seconds: float) -> list[float]:
    """Return each block's share of seeds in whose last frame every colour that ``prompt`` names shows."""
    rollout = Rollout(model, None, [prompt] * seeds, range(seeds))
    blocks = math.ceil(seconds * model.config.fps / (4 * model.config.window.frames_per_block))
    shares = []
    for _ in tqdm(range(blocks), desc="blocks"):
        _, frames = rollout.next_block()
        shares.append(sum(judge_frame(prompt, frame).colours for frame in frames[:, -1]) / seeds)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle drifts over a dark field")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="denoising steps, evenly spaced; by default the model's")
    parser.add_argument("--shift", type=float, help="of the noise levels; by default the model's")
    args = parser.parse_args()
    model = load_checkpoint(args.model)
    sampler = model.config.sampler
    if args.steps is not None:
        sampler = replace(sampler, steps=tuple(round(1000 * (args.steps - i) / args.steps) for i in range(args.steps)))
    if args.shift is not None:
        sampler = replace(sampler, shift=args.shift)
    model = model._replace(config=replace(model.config, sampler=sampler))
    shares = kept(model, args.prompt, args.seeds, args.seconds)
    tail = shares[-max(1, len(shares) // 8) :]
    whole, end = sum(shares) / len(shares), sum(tail) / len(tail)
    print(f"every named colour shows in {whole:.1%} of blocks, {end:.1%} in the last eighth")  # noqa: T201


if __name__ == "__main__":
    main()
