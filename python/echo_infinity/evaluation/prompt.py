"""Prompt: do the objects that a prompt names show, in their colours and shapes, and nothing else?"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from echo_infinity.codec import to_uint8
from echo_infinity.evaluation.objects import find_objects
from echo_infinity.evaluation.recall import wilson
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler, Generator
from echo_infinity.weights import Checkpoint, load_checkpoint
from echo_infinity.worlds import World, block_start
from echo_infinity.worlds.grammar import NamedObject, parse

_SETTLE = 5.0  # seconds by which the objects have come in


@dataclass(frozen=True)
class PromptScore:
    """Shares of judged frames: every named colour shows; with its shape; and no other object; ``n`` rollouts.

    ``low`` and ``high`` are a 95 % interval of ``rollouts``, the share of rollouts in most of whose frames every named
    colour shows.
    """

    colours: float
    shapes: float
    alone: float
    rollouts: float
    low: float
    high: float
    n: int


def prompts(count: int, seed: int = 5000) -> list[str]:
    """Prompts of held-out open worlds that name their objects."""
    return [World.from_seed(seed + i, "open", name_objects=True).prompt for i in range(count)]


@torch.inference_mode()
def adherence(
    checkpoint: Checkpoint, texts: Sequence[str], seconds: float = 20.0, seed: int = 0, batch: int = 16
) -> PromptScore:
    """Generate a video for each prompt and look for what it names, twice a second once the objects have come in.

    Args:
        checkpoint: the model.
        texts: prompts that name every object.
        seconds: length of each video, more than four.
        seed: of the noise.
        batch: videos generated side by side.

    Raises:
        ValueError: a prompt names no object, or the videos are too short to judge.
    """
    if seconds <= _SETTLE:
        raise ValueError(f"seconds must be more than {_SETTLE:g}, by when the objects have come in, got {seconds}")
    frames: list[list[tuple[bool, bool, bool]]] = []
    for first in tqdm(range(0, len(texts), batch), desc="prompts", mininterval=2.0):
        some = texts[first : first + batch]
        for text, video in zip(some, _videos(checkpoint, some, seconds, seed + first), strict=True):
            frames.append([judge_frame(text, frame) for frame in video])
    judged = [frame for video in frames for frame in video]
    colours, shapes, alone = (sum(column) / len(judged) for column in zip(*judged, strict=True))
    good = [sum(colour for colour, _, _ in video) > len(video) / 2 for video in frames]
    share = sum(good) / len(good)
    return PromptScore(colours, shapes, alone, share, *wilson(share, len(good)), len(good))


def judge_frame(prompt: str, frame: Tensor) -> tuple[bool, bool, bool]:
    """Say of a frame ``(3, 64, 64)`` uint8: every named colour shows; with its shape; nothing else shows.

    Raises:
        ValueError: the prompt does not name its objects.
    """
    named = _named(prompt)
    found = find_objects(frame)
    colours: Counter[str | None] = Counter(x.colour for x in found)
    looks: Counter[tuple[str | None, str | None]] = Counter((x.colour, x.shape) for x in found)
    wanted = Counter(x.colour for x in named)
    right = not wanted - colours
    return right, not Counter((x.colour, x.shape) for x in named) - looks, right and not colours - wanted


def _named(prompt: str) -> Sequence[NamedObject]:
    named = parse(prompt).objects
    if named is None or any(x.colour is None or x.shape is None for x in named):
        raise ValueError(f"prompt {prompt!r} leaves objects unnamed; there is nothing to judge it by")
    return named


def _videos(checkpoint: Checkpoint, texts: Sequence[str], seconds: float, seed: int) -> Tensor:
    """Frames to judge, ``(B, N, 3, 64, 64)`` uint8."""
    config = checkpoint.config
    generator = Generator(config, checkpoint.model, checkpoint.memory)
    text = checkpoint.model.encode_text(checkpoint.text.encode(list(texts)))
    sampler = BlockSampler(generator, text, counter_noise(seed), len(texts))
    kept, state, per = [], None, 4 * config.window.frames_per_block
    for block in range(math.ceil((seconds * config.fps + 3) / per)):
        pixels, state = checkpoint.codec.decode(sampler.next_block(), state)
        begins = block_start(block)
        for i in range(pixels.shape[1]):
            frame = begins + i
            if frame >= _SETTLE * config.fps and frame % max(1, config.fps // 2) == 0:
                kept.append(to_uint8(pixels[:, i]))
    return torch.stack(kept, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity evaluate prompt``."""
    parser.add_argument("--model", default="tiny", help="bundled model or folder")
    parser.add_argument("--prompts", type=int, default=64, help="number of held-out prompts")
    parser.add_argument("--prompt", help="judge this one prompt with --prompts seeds instead")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the score here too")


def run(args: argparse.Namespace) -> int:
    """Print a table; return the exit code."""
    texts = [args.prompt] * args.prompts if args.prompt else prompts(args.prompts)
    score = adherence(load_checkpoint(args.model), texts, args.seconds, args.seed)
    print("| colours | with shapes | nothing else | rollouts mostly right | 95 % interval | rollouts |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    interval = f"{score.low:.3f}-{score.high:.3f}"
    shares = " | ".join(f"{x:.3f}" for x in (score.colours, score.shapes, score.alone, score.rollouts))
    print(f"| {shares} | {interval} | {score.n} |")  # noqa: T201
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(score), indent=1) + "\n")
    return 0
