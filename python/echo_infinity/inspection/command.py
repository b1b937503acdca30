"""``echo-infinity inspect``: generate a video and draw what its memory reads, and what reads its memory.

Writes tiers.png, queries.png, gates.png, writes.png and inspect.mp4 (docs/evaluation.md says what they show).
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from echo_infinity.codec import TIME_STRIDE, to_uint8
from echo_infinity.inspection.drawing import Panels, draw_gates, draw_queries, draw_tiers, draw_writes
from echo_infinity.inspection.watch import Watcher
from echo_infinity.noise import counter_noise
from echo_infinity.policies import POLICIES, make_sampler
from echo_infinity.settings import frame_count
from echo_infinity.video import open_writer
from echo_infinity.weights import Checkpoint, load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity inspect``."""
    parser.add_argument("prompt", nargs="?", default="shapes drift over a dark field behind a curtain")
    parser.add_argument("--model", default="tiny", help="bundled model or folder")
    parser.add_argument("--policy", help=f"of {', '.join(POLICIES)} (default: the model's own)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the video")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("inspect"), help="folder of the pictures and the video")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Generate, draw, print the files' names; return the exit code."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("inspect draws with matplotlib: pip install 'echo-infinity[train]'")
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    blocks = -(-frame_count(args.seconds, checkpoint.config.fps) // (TIME_STRIDE * _per(checkpoint)))
    for name in inspect(checkpoint, args.policy, args.prompt, blocks, args.out, args.seed):
        print(args.out / name)  # noqa: T201
    return 0


@torch.inference_mode()
def inspect(
    checkpoint: Checkpoint, policy: str | None, prompt: str, blocks: int, out: Path, seed: int = 0
) -> list[str]:
    """Generate ``blocks`` blocks, watched, and draw them into the folder ``out``.

    Args:
        checkpoint: the model.
        policy: its name; None for the model's own.
        prompt: what to show.
        blocks: length.
        out: an existing folder.
        seed: of the noise.

    Returns:
        Names of the files; a policy without writes has no gates and writes to draw.
    """
    text = checkpoint.model.encode_text(checkpoint.text.encode([prompt]))
    sampler = make_sampler(checkpoint, policy, text, counter_noise(seed))
    sampler.graphs = None
    config, per = sampler.generator.config, _per(checkpoint)
    watcher, panels, state = Watcher(sampler), Panels(config), None
    pictures: dict[int, Tensor] = {}  # by latent frame
    height, width = panels.size
    with open_writer(out / "inspect.mp4", width=width, height=height, fps=config.fps, overwrite=True) as writer:
        for block in tqdm(range(blocks), desc="inspect", mininterval=2.0, disable=None):
            pixels, state = checkpoint.codec.decode(watcher.next_block(), state)
            frames = to_uint8(pixels[0]).cpu()
            for i in range(per):
                pictures[block * per + i] = frames[len(frames) - 1 - TIME_STRIDE * (per - 1 - i)]
            writer.write(panels.frames(watcher.views[-1], frames.permute(0, 2, 3, 1)))
    draw_tiers(watcher.views, out / "tiers.png")
    draw_queries(watcher.views, pictures, config, out / "queries.png")
    names = ["inspect.mp4", "tiers.png", "queries.png"]
    if draw_gates(watcher.views, out / "gates.png"):
        names.append("gates.png")
    if draw_writes(watcher.views, pictures, config, out / "writes.png"):
        names.append("writes.png")
    return names


def _per(checkpoint: Checkpoint) -> int:
    return checkpoint.config.window.frames_per_block
