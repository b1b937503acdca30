"""A cache of encoded clips for training the generator, with what is in sight in every block."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..codec import Codec, to_unit
from ..worlds import World, block_start
from ..worlds.curtain import FRAMES_PER_BLOCK
from .mixes import LOCAL_BLOCKS, MIXES, SHORT_ABSENCE, ClipMix, clip_world, draw_clip

MARKS = ("closed", "sighted", "first_open", "reappear")


@dataclass(frozen=True)
class Clips:
    """A cache in memory.

    ``latents`` is ``(N, F, C, h, w)`` float16, normalised; ``shown``, alike, is what the model is shown of them, which
    differs in clips that lose their objects for a while. The others are ``(N, F / 3)`` bool: ``closed`` the curtain
    is closed all through the block; ``sighted`` an object shows; ``first_open`` an object shows for the first time;
    ``reappear`` an object shows that showed once, but in none of the frames of the local window before this block.
    From where a clip loses its objects no block is ``reappear``, and one in which they are missed is ``first_open``.
    ``clips`` holds, per clip, what ``clip_world`` needs.
    """

    latents: Tensor
    shown: Tensor
    closed: Tensor
    sighted: Tensor
    first_open: Tensor
    reappear: Tensor
    prompts: list[str]
    clips: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)


def annotate(world: World, blocks: int, lost: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Return the clip's :data:`MARKS`, each ``(blocks,)`` bool; :class:`Clips` says what they are.

    Args:
        world: what it shows.
        blocks: its length.
        lost: blocks [first, end) that are shown without objects.
    """
    count = block_start(blocks)
    starts = [block_start(b) for b in range(blocks + 1)]
    shown = world.in_sight(0, count)
    curtain = world.curtains(0, count) >= 1
    seen = torch.stack([shown[a:b].any(0) for a, b in itertools.pairwise(starts)])  # (blocks, objects)
    before = torch.zeros_like(seen)
    first, again = torch.zeros(blocks, dtype=torch.bool), torch.zeros(blocks, dtype=torch.bool)
    for b in range(blocks):
        window = max(0, b - LOCAL_BLOCKS + 1)
        before[b] = seen[:window].any(0)
        first[b] = (seen[b] & ~seen[:b].any(0)).any()
        again[b] = (seen[b] & before[b] & ~seen[window:b].any(0)).any()
    if lost is not None:
        again[lost[0] :] = False
        held = seen.any(1)  # blocks that are shown with objects, which the window then holds
        held[slice(*lost)] = False
        missed = [b for b in range(*lost) if seen[b].any() and not held[max(0, b - LOCAL_BLOCKS + 1) : b].any()]
        if missed:  # one of them, or there would be many more of these than of true first sights
            first[missed[sum(lost) % len(missed)]] = True
    closed = torch.stack([curtain[a:b].all() for a, b in itertools.pairwise(starts)])
    return dict(zip(MARKS, (closed, seen.any(1), first, again), strict=True))


def build_clips(
    codec: Codec,
    out_dir: str | os.PathLike[str],
    count: int,
    latent_frames: int,
    seed: int = 0,
    mix: ClipMix = SHORT_ABSENCE,
    shard: int = 256,
    batch: int = 4,
    progress: bool = True,
) -> Path:
    """Render, encode and write ``count`` clips; finished shards are kept, so a broken run goes on where it was.

    Args:
        codec: in evaluation mode.
        out_dir: folder of ``shard-00000.safetensors`` and so on; usable by ``load_clips`` while it fills.
        count: number of clips.
        latent_frames: latents a clip, a multiple of 3.
        seed: first part of every clip's seed; other seeds give other clips.
        mix: what the clips show.
        shard: clips a file.
        batch: clips encoded at once.
        progress: whether to show a progress bar.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: ``latent_frames`` is no multiple of 3, or the folder holds clips of other settings.
    """
    if latent_frames < FRAMES_PER_BLOCK or latent_frames % FRAMES_PER_BLOCK:
        raise ValueError(f"latent_frames must be a multiple of {FRAMES_PER_BLOCK}, got {latent_frames}")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"latent_frames": latent_frames, "seed": seed, "shard": shard, "mix": asdict(mix)})
    note = out / "settings.json"
    if note.is_file() and note.read_text() != settings:
        raise ValueError(f"{out} holds clips of {note.read_text()}, not of {settings}; use another folder")
    note.write_text(settings)
    device = codec.latent_mean.device
    bar = tqdm(total=count, desc="clips", mininterval=2.0, disable=not progress)
    for index, first in enumerate(range(0, count, shard)):
        size = min(shard, count - first)
        path = out / f"shard-{index:05d}.safetensors"
        if not path.is_file() or _shard_size(path) < size:
            clips = range(first, first + size)
            _write_shard(path, _encode(codec, clips, latent_frames, seed, mix, batch, device, bar))
        else:
            bar.update(size)
    bar.close()
    return out


def load_clips(path: str | os.PathLike[str], limit: int | None = None) -> Clips:
    """Return the clips a folder holds by now, at most ``limit`` of them.

    Raises:
        ValueError: the folder holds no clips, or a shard can't be read.
    """
    parts: list[dict[str, Tensor]] = []
    recipes: list[dict[str, Any]] = []
    for file_path in sorted(Path(path).glob("shard-*.safetensors")):
        if limit is not None and len(recipes) >= limit:
            break
        try:
            with safe_open(file_path, "pt") as file:
                recipes += json.loads(file.metadata()["clips"])
                part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                parts.append({"shown": part["latents"], **part})
        except SafetensorError as error:
            raise ValueError(f"{file_path} can't be read ({error}); delete it and build the clips again") from error
    if not parts:
        raise ValueError(f"no clips in {path}; build them with 'echo-infinity train clips'")
    tensors = {name: torch.cat([part[name] for part in parts])[:limit] for name in parts[0]}
    recipes = recipes[:limit]
    return Clips(**tensors, prompts=[recipe["prompt"] for recipe in recipes], clips=recipes)


def join_clips(parts: Sequence[Clips], blocks: int) -> Clips:
    """Return the clips of several caches as one, cut to their first ``blocks`` blocks.

    Raises:
        ValueError: a cache's clips are shorter than that.
    """
    shortest = min(part.closed.shape[1] for part in parts)
    if shortest < blocks:
        raise ValueError(f"the clips have {shortest} blocks, {blocks} are asked for; build longer ones or use fewer")
    frames = blocks * FRAMES_PER_BLOCK
    return Clips(
        torch.cat([part.latents[:, :frames] for part in parts]),
        torch.cat([part.shown[:, :frames] for part in parts]),
        **{name: torch.cat([getattr(part, name)[:, :blocks] for part in parts]) for name in MARKS},
        prompts=[prompt for part in parts for prompt in part.prompts],
        clips=[recipe for part in parts for recipe in part.clips],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train clips``."""
    parser.add_argument("--codec", type=Path, required=True, help="the codec's safetensors file")
    parser.add_argument("--out", type=Path, default=Path("runs/clips"), help="folder of the clips")
    parser.add_argument("--count", type=int, default=3072)
    parser.add_argument("--latent-frames", type=int, default=33, help="latents a clip, a multiple of 3")
    mixes = "; ".join(f"{name}: {mix.summary()}" for name, mix in MIXES.items())
    parser.add_argument(
        "--mix", choices=MIXES, default="short", help=mixes.replace("%", "%%") + " (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Build the cache the options describe; return the exit code."""
    codec = Codec.load(args.codec)
    build_clips(codec, args.out, args.count, args.latent_frames, args.seed, MIXES[args.mix])
    return 0


@torch.no_grad()
def _encode(
    codec: Codec,
    clips: range,
    latent_frames: int,
    seed: int,
    mix: ClipMix,
    batch: int,
    device: torch.device,
    bar: tqdm,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    blocks = latent_frames // FRAMES_PER_BLOCK
    parts: dict[str, list[Tensor]] = {"latents": [], **({"shown": []} if mix.lost else {})}
    marks, recipes = [], []
    for first in range(clips.start, clips.stop, batch):
        group = [draw_clip((seed + 1 << 32) + i, blocks, mix) for i in range(first, min(first + batch, clips.stop))]
        worlds = [clip_world(recipe) for recipe in group]
        losses = [recipe["lost"] for recipe in group]
        frames = torch.stack([world.render(0, block_start(blocks)) for world in worlds])
        latents = codec.encode(to_unit(frames).to(device))[0].half().cpu()
        parts["latents"].append(latents)
        if mix.lost:
            rows = [i for i, lost in enumerate(losses) if lost is not None]
            shown = latents.clone()
            if rows:
                bare = _without_objects(frames[rows], [worlds[i] for i in rows], [losses[i] for i in rows])
                shown[rows] = codec.encode(to_unit(bare).to(device))[0].half().cpu()
            parts["shown"].append(shown)
        marks += [annotate(world, blocks, lost) for world, lost in zip(worlds, losses, strict=True)]
        recipes += [recipe | {"prompt": world.prompt} for recipe, world in zip(group, worlds, strict=True)]
        bar.update(len(group))
    tensors = {name: torch.stack([m[name] for m in marks]) for name in MARKS}
    return tensors | {name: torch.cat(x) for name, x in parts.items()}, recipes


def _without_objects(frames: Tensor, worlds: Sequence[World], losses: Sequence[tuple[int, int]]) -> Tensor:
    """Return clips ``(N, F, 3, H, W)`` with the blocks that lose their objects drawn without them."""
    frames = frames.clone()
    for clip, world, lost in zip(frames, worlds, losses, strict=True):
        start, end = (block_start(b) for b in lost)
        clip[start:end] = replace(world, objects=()).render(start, end - start)
    return frames


def _write_shard(path: Path, content: tuple[dict[str, Tensor], Sequence[dict[str, Any]]]) -> None:
    partial = path.with_suffix(".partial")
    save_file(content[0], partial, metadata={"clips": json.dumps(content[1])})
    os.replace(partial, path)


def _shard_size(path: Path) -> int:
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("latents").get_shape()[0]
    except SafetensorError:
        return 0
