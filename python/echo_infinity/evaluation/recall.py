"""Recall: a curtain hides the scene for longer than the window; do the objects come back in their colours?

The true video is shown up to the reopening (codec, context passes, memory writes), the reopening is generated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from echo_infinity.codec import to_uint8, to_unit
from echo_infinity.noise import counter_noise
from echo_infinity.recall import StreamMemory
from echo_infinity.sampler import BlockSampler, Generator
from echo_infinity.weights import Checkpoint, load_checkpoint
from echo_infinity.worlds import COLOUR_NAMES, World, block_start, nearest_colour

MODES = ("on", "off", "swapped", "frozen")


@dataclass(frozen=True)
class RecallTest:
    """What is shown and what is asked.

    Args:
        scenes: number of scenes, none of which occurs in training.
        sight: open blocks before the curtain closes.
        absence: closed blocks; the whole window is ``window_frames / frames_per_block`` blocks.
        seed: of the first scene and of the noise.
        batch: scenes generated side by side.
    """

    scenes: int = 256
    sight: int = 2
    absence: int = 5
    seed: int = 0
    batch: int = 32

    @property
    def reopening(self) -> int:
        """Block in which the curtain opens again."""
        return 1 + self.sight + self.absence


@dataclass(frozen=True)
class RecallScore:
    """Shares over objects: ``colour`` whose pixels mostly have the right nearest colour; ``pixels`` mean share of an
    object's pixels with the right one; ``low`` and ``high`` a 95 % interval of ``colour``."""

    mode: str
    colour: float
    low: float
    high: float
    pixels: float
    objects: int


def recall(checkpoint: Checkpoint, test: RecallTest, mode: str = "on") -> RecallScore:
    """Score a model's recall of colours.

    Args:
        checkpoint: the model.
        test: the scenes.
        mode: "on"; "off" leaves memory out; "swapped" reads another scene's memory at the reopening; "frozen" keeps
            the memory at its learned start.

    Raises:
        ValueError: unknown mode, or the absence is not longer than the window.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    w = checkpoint.config.window
    if test.absence * w.frames_per_block <= w.window_frames:
        raise ValueError(
            f"absence {test.absence} blocks = {test.absence * w.frames_per_block} frames is not longer than the "
            f"window of {w.window_frames}"
        )
    hits: list[bool] = []
    shares: list[float] = []
    for first in tqdm(range(0, test.scenes, test.batch), desc=f"recall, memory {mode}", mininterval=2.0):
        worlds = [scene(test, test.seed + i) for i in range(first, min(first + test.batch, test.scenes))]
        frames = reopening(checkpoint, worlds, test, mode, noise_seed=test.seed + first)
        for world, video in zip(worlds, frames, strict=True):
            for hit, share in object_scores(world, video, block_start(test.reopening)):
                hits.append(hit)
                shares.append(share)
    colour, n = sum(hits) / len(hits), len(hits)
    low, high = wilson(colour, n)
    return RecallScore(mode, colour, low, high, sum(shares) / n, n)


@torch.no_grad()
def reopening(
    checkpoint: Checkpoint, worlds: list[World], test: RecallTest, mode: str, *, noise_seed: int = 0
) -> Tensor:
    """Show each world up to its reopening and generate that block.

    Returns:
        ``(B, 12, 3, H, W)`` uint8 pixel frames of the reopening's block.
    """
    config, blocks, per = checkpoint.config, test.reopening, checkpoint.config.window.frames_per_block
    truth = torch.stack([world.render(0, block_start(blocks)) for world in worlds])
    latents, _ = checkpoint.codec.encode(to_unit(truth))
    memory = None if mode == "off" else checkpoint.memory
    if memory is None and mode != "off":
        raise ValueError(f"this model has no memory, so mode {mode!r} has no meaning")
    generator = Generator(config, checkpoint.model, memory)
    text = checkpoint.model.encode_text(checkpoint.text.encode([world.prompt for world in worlds]))
    sampler = BlockSampler(generator, text, counter_noise(noise_seed), len(worlds))
    for block in range(blocks):
        sampler.observe(latents[:, block * per : (block + 1) * per])
    if isinstance(sampler.memory, StreamMemory) and mode == "swapped":
        sampler.memory.replace(sampler.memory.state.roll(1, dims=1))
    if isinstance(sampler.memory, StreamMemory) and mode == "frozen":
        sampler.memory.replace(sampler.memory.module.start(len(worlds)))
    state = checkpoint.codec.decode(latents)[1]
    return to_uint8(checkpoint.codec.decode(sampler.next_block(), state)[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity evaluate recall``."""
    parser.add_argument("--model", default="tiny", help="bundled model or folder")
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--sight", type=int, default=2, help="open blocks before the curtain closes")
    parser.add_argument("--absence", type=int, default=5, help="closed blocks, 12 pixel frames each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["on", "off", "swapped"])
    parser.add_argument("--json", type=Path, default=None, help="write the scores here too")


def run(args: argparse.Namespace) -> int:
    """Print a table of scores; return the exit code."""
    checkpoint = load_checkpoint(args.model)
    test = RecallTest(args.scenes, args.sight, args.absence, args.seed)
    scores = [recall(checkpoint, test, mode) for mode in args.modes]
    print("| memory | right colour | 95 % interval | pixels | objects |\n|---|---|---|---|---|")  # noqa: T201
    for s in scores:
        print(f"| {s.mode} | {s.colour:.3f} | {s.low:.3f}-{s.high:.3f} | {s.pixels:.3f} | {s.objects} |")  # noqa: T201
    if args.json is not None:
        args.json.write_text(json.dumps([vars(s) for s in scores], indent=1) + "\n")
    return 0


def scene(test: RecallTest, seed: int) -> World:
    """Return a world whose prompt names no object, with the curtain on the test's schedule."""
    closed = [True] + [False] * test.sight + [True] * test.absence + [False] * 4
    return World.from_seed(seed, "curtain", name_objects=False, curtain_blocks=closed)


def object_scores(world: World, video: Tensor, start: int) -> list[tuple[bool, float]]:
    """Score each object in the frames with the curtain fully open.

    Args:
        world: the truth.
        video: ``(N, 3, H, W)`` uint8 frames.
        start: number of the first one.

    Returns:
        Per object in sight: whether most of its true pixels have its colour as the nearest one, and their share.
    """
    found: dict[int, list[Tensor]] = {}
    for i, frame in enumerate(video):
        if world.curtain(start + i) > 0:
            continue
        for number, mask in enumerate(world.masks(start + i)):
            if mask.sum() >= 20:  # a sliver behind another object has no colour to speak of
                found.setdefault(number, []).append(frame.permute(1, 2, 0)[mask])
    scores = []
    for number, pixels in found.items():
        colours, right = nearest_colour(torch.cat(pixels)), COLOUR_NAMES.index(world.objects[number].colour)
        most = int(colours.bincount(minlength=len(COLOUR_NAMES)).argmax())
        scores.append((most == right, (colours == right).float().mean().item()))
    return scores


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of ``n``."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half
