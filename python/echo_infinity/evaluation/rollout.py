"""Long rollouts: does minute ten still look and move like minute one, and like the real worlds?"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor
from tqdm import tqdm

from echo_infinity.codec import Codec, to_uint8, to_unit
from echo_infinity.evaluation.features import block_features, frechet, motion
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler, Generator
from echo_infinity.weights import Checkpoint, load_checkpoint
from echo_infinity.worlds import World, block_start


@dataclass
class Rollout:
    """One row a minute; ``sheet`` holds a frame of every stream at regular times, ``(times, B, 3, H, W)`` uint8."""

    distance: list[float] = field(default_factory=list)  # Frechet distance to real clips of the same prompts
    motion: list[float] = field(default_factory=list)  # grey levels a frame
    real_motion: float = 0.0
    real_distance: float = 0.0  # between two halves of the real clips: the floor of ``distance``
    sheet: Tensor = field(default_factory=lambda: torch.empty(0))


def rollout(checkpoint: Checkpoint, prompts: Sequence[str], minutes: int, seed: int = 0, rows: int = 10) -> Rollout:
    """Generate ``minutes`` of video for each prompt side by side, freely from noise, and measure every minute.

    Args:
        checkpoint: the model.
        prompts: one a stream.
        minutes: length.
        seed: of the noise.
        rows: frames of each stream kept for the contact sheet.

    Raises:
        ValueError: fewer than 1 minute.
    """
    if minutes < 1:
        raise ValueError(f"need at least one minute, got {minutes}")
    config = checkpoint.config
    per_minute = math.ceil(60 * config.fps / (4 * config.window.frames_per_block))
    real, real_motion = real_features(checkpoint.codec, prompts, per_minute, config.window.frames_per_block)
    generator = Generator(config, checkpoint.model, checkpoint.memory)
    text = checkpoint.model.encode_text(checkpoint.text.encode(list(prompts)))
    sampler = BlockSampler(generator, text, counter_noise(seed), len(prompts))
    result, state, sheet = Rollout(real_motion=real_motion), None, []
    result.real_distance = frechet(real[0::2], real[1::2])
    every = max(1, minutes * per_minute // rows)
    with torch.inference_mode():
        for minute in range(minutes):
            features, moves = [], []
            for block in tqdm(range(per_minute), desc=f"minute {minute + 1} of {minutes}", mininterval=5.0):
                latents = sampler.next_block()
                frames, state = checkpoint.codec.decode(latents, state)
                pixels = to_uint8(frames)
                features.append(block_features(latents))
                moves.append(motion(pixels).mean())
                if (minute * per_minute + block) % every == every - 1:
                    sheet.append(pixels[:, -1])
            result.distance.append(frechet(torch.cat(features), real))
            result.motion.append(torch.stack(moves).mean().item())
    result.sheet = torch.stack(sheet[:rows])
    return result


@torch.inference_mode()
def real_features(codec: Codec, prompts: Sequence[str], blocks: int, frames_per_block: int) -> tuple[Tensor, float]:
    """Features of ``blocks`` blocks of a real world of each prompt, and their mean motion."""
    features, moves = [], []
    for number, prompt in enumerate(prompts):
        video = World.from_prompt(prompt, seed=number).render(0, block_start(blocks))[None]
        latents, _ = codec.encode(to_unit(video))
        features.append(block_features(latents.unflatten(1, (blocks, frames_per_block))[0]))
        moves.append(motion(video).item())
    return torch.cat(features), sum(moves) / len(moves)


def contact_sheet(frames: Tensor, path: Path, gap: int = 2) -> None:
    """Write frames ``(rows, columns, 3, H, W)`` uint8 as one PNG: a row a time, a column a stream."""
    rows, columns, _, height, width = frames.shape
    sheet = torch.full((rows * (height + gap), columns * (width + gap), 3), 255, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            y, x = r * (height + gap), c * (width + gap)
            sheet[y : y + height, x : x + width] = frames[r, c].permute(1, 2, 0)
    write_png(path, sheet)


def write_png(path: Path, picture: Tensor) -> None:
    """Write ``(H, W, 3)`` uint8 as a PNG."""
    with open(path, "wb") as file:
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
        encoder.time_base = Fraction(1)
        frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")
        for packet in [*encoder.encode(frame), *encoder.encode(None)]:
            file.write(bytes(packet))


def default_prompts(count: int) -> list[str]:
    """Prompts of held-out worlds, curtain, path and open in turn."""
    kinds = ("curtain", "path", "open")
    return [World.from_seed(1000 + i, kinds[i % 3], name_objects=i % 2 == 0).prompt for i in range(count)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity evaluate rollout``."""
    parser.add_argument("--model", default="tiny", help="bundled model or folder")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--streams", type=int, default=8, help="prompts generated side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("rollout"), help="folder of the table and contact sheet")


def run(args: argparse.Namespace) -> int:
    """Print a table, a row a minute; write it and a contact sheet; return the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    result = rollout(load_checkpoint(args.model), default_prompts(args.streams), args.minutes, args.seed)
    lines = ["| minute | feature distance | motion |", "|---|---|---|"]
    lines += [
        f"| {i + 1} | {d:.3f} | {m:.3f} |" for i, (d, m) in enumerate(zip(result.distance, result.motion, strict=True))
    ]
    lines.append(f"| real worlds | {result.real_distance:.3f} | {result.real_motion:.3f} |")
    lines.append("")
    lines.append(
        f"last / first minute: distance {result.distance[-1] / result.distance[0]:.2f}, "
        f"motion {result.motion[-1] / result.motion[0]:.2f}"
    )
    print("\n".join(lines))  # noqa: T201
    (args.out / "rollout.md").write_text("\n".join(lines) + "\n")
    rows = {name: value for name, value in vars(result).items() if name != "sheet"}
    (args.out / "rollout.json").write_text(json.dumps(rows, indent=1) + "\n")
    contact_sheet(result.sheet, args.out / "contact_sheet.png")
    return 0
