"""A cache of encoded clips for training the generator, with what is in sight in every block."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..codec import Codec, to_unit
from ..worlds import World, block_start
from ..worlds.curtain import FRAMES_PER_BLOCK

Odds = tuple[tuple[int, float], ...]
LOCAL_BLOCKS = 3  # the local window, 9 latent frames, the current block included


@dataclass(frozen=True)
class ClipMix:
    """What the clips show. ``Odds`` are pairs (number of blocks, weight).

    Args:
        curtain, random_curtain, path, open: weights of the kinds: curtain aligned to blocks, curtain with random
            durations, objects that leave along a path, objects that stay.
        unnamed: share of prompts that don't name the objects, by kind alike.
        wait: closed blocks at the start (block 0 holds the sink frames).
        sight: open blocks the first time.
        absence: closed blocks between sights. 2 is the least: the objects have then just left the local window.
        return_sight: open blocks every later time.
        lost: share of clips, paths excepted, of which the model is shown a part without the objects, as if its own
            rollout had lost them; what it is asked for has them still, so it learns to bring them back.
    """

    curtain: float = 0.7
    random_curtain: float = 0.1
    path: float = 0.1
    open: float = 0.1
    unnamed: float = 0.75
    wait: Odds = ((1, 0.7), (2, 0.3))
    sight: Odds = ((1, 0.5), (2, 0.5))
    absence: Odds = ((2, 0.55), (3, 0.35), (4, 0.1))
    return_sight: Odds = ((2, 0.75), (3, 0.25))
    lost: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                if value < 0:
                    raise ValueError(f"{field.name} must not be negative, got {value}")
            elif not value or any(blocks < 1 or weight < 0 for blocks, weight in value):
                raise ValueError(f"{field.name} must be pairs (blocks >= 1, weight >= 0), got {value}")
        if min(blocks for blocks, _ in self.absence) < LOCAL_BLOCKS - 1:
            raise ValueError(
                f"absence {self.absence} is shorter than {LOCAL_BLOCKS - 1} blocks: the objects would still be in "
                "the local window when the curtain opens"
            )

    def summary(self) -> str:
        """Say in a line what the clips show."""
        total = self.curtain + self.random_curtain + self.path + self.open
        closed = f"curtains closed for {self.absence[0][0]}-{self.absence[-1][0]} blocks"
        shares = {closed: self.curtain, "random curtains": self.random_curtain, "paths": self.path, "open": self.open}
        parts = [f"{share / total:.0%} {kind}" for kind, share in shares.items() if share]
        parts += [f"objects lost for a while in {self.lost:.0%} of the others"] if self.lost else []
        return ", ".join([*parts, f"{1 - self.unnamed:.0%} of prompts name the objects"])


SHORT_ABSENCE = ClipMix()
LONG_ABSENCE = ClipMix(absence=((2, 0.2), (3, 0.25), (4, 0.25), (5, 0.15), (6, 0.15)))
EVEN = ClipMix(
    curtain=0.3,
    open=0.5,
    unnamed=0.5,
    absence=((2, 0.15), (3, 0.2), (4, 0.2), (5, 0.15), (6, 0.1), (8, 0.1), (12, 0.1)),
)
NAMED = ClipMix(curtain=0.0, random_curtain=0.0, path=0.0, open=1.0, unnamed=0.1)
RECOVER = replace(
    EVEN,
    sight=((1, 0.4), (2, 0.4), (3, 0.1), (4, 0.04), (5, 0.03), (6, 0.02), (7, 0.01)),
    return_sight=((2, 0.6), (3, 0.28), (4, 0.05), (5, 0.03), (6, 0.02), (7, 0.01), (8, 0.01)),
    lost=0.4,
)
MIXES = {"short": SHORT_ABSENCE, "long": LONG_ABSENCE, "even": EVEN, "named": NAMED, "recover": RECOVER}


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


def draw_clip(seed: int, blocks: int, mix: ClipMix) -> dict[str, Any]:
    """Return the recipe of clip number ``seed``: kind, schedule and whether the prompt names the objects."""
    rng = np.random.default_rng([seed, 3])
    kinds = ("curtain", "random_curtain", "path", "open")
    weights = np.array([getattr(mix, kind) for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    recipe: dict[str, Any] = {"seed": seed, "kind": "curtain" if kind == "random_curtain" else kind}
    recipe["name_objects"] = bool(rng.random() >= mix.unnamed)
    recipe["curtain_blocks"] = None
    if kind == "curtain":
        closed = [True] * _draw(rng, mix.wait) + [False] * _draw(rng, mix.sight)
        while len(closed) < blocks:
            closed += [True] * _draw(rng, mix.absence) + [False] * _draw(rng, mix.return_sight)
        recipe["curtain_blocks"] = closed  # past the clip's end too, so that the last timer tells the truth
    recipe["lost"] = _draw_loss(seed, kind, blocks, mix.lost)
    return recipe


def _draw_loss(seed: int, kind: str, blocks: int, share: float) -> tuple[int, int] | None:
    """Return the blocks [first, end) that are shown without objects, if any."""
    rng = np.random.default_rng([seed, 4])
    if kind == "path" or rng.random() >= share:  # of a path the model can't tell objects that are away from lost ones
        return None
    first = int(rng.integers(max(1, blocks - 2)))
    return first, min(blocks, first + int(rng.integers(3, max(4, blocks + 1))))


def clip_world(recipe: dict[str, Any]) -> World:
    """Return the world a clip was rendered from, for its truth."""
    return World.from_seed(recipe["seed"], recipe["kind"], recipe["name_objects"], recipe["curtain_blocks"])


def annotate(world: World, blocks: int, lost: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Return the clip's ``closed``, ``sighted``, ``first_open`` and ``reappear``, each ``(blocks,)`` bool.

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
        shown_to = seen.any(1)
        shown_to[slice(*lost)] = False
        missed = [b for b in range(*lost) if seen[b].any() and not shown_to[max(0, b - LOCAL_BLOCKS + 1) : b].any()]
        if missed:  # one of them, or there would be many more of these than of true first sights
            first[missed[sum(lost) % len(missed)]] = True
    closed = torch.stack([curtain[a:b].all() for a, b in itertools.pairwise(starts)])
    return {"closed": closed, "sighted": seen.any(1), "first_open": first, "reappear": again}


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
    marks = ("closed", "sighted", "first_open", "reappear")
    return Clips(
        torch.cat([part.latents[:, :frames] for part in parts]),
        torch.cat([part.shown[:, :frames] for part in parts]),
        **{name: torch.cat([getattr(part, name)[:, :blocks] for part in parts]) for name in marks},
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
    blocks, count = latent_frames // FRAMES_PER_BLOCK, block_start(latent_frames // FRAMES_PER_BLOCK)
    latents, shown, marks, recipes = [], [], [], []
    for first in range(clips.start, clips.stop, batch):
        group = [draw_clip((seed + 1 << 32) + i, blocks, mix) for i in range(first, min(first + batch, clips.stop))]
        worlds = [clip_world(recipe) for recipe in group]
        frames = torch.stack([world.render(0, count) for world in worlds])
        latents.append(codec.encode(to_unit(frames).to(device))[0].half().cpu())
        shown.append(latents[-1].clone())
        losses = [recipe["lost"] for recipe in group]
        if rows := [i for i, lost in enumerate(losses) if lost is not None]:
            for i in rows:
                start, end = (block_start(b) for b in losses[i])
                frames[i, start:end] = replace(worlds[i], objects=()).render(start, end - start)
            shown[-1][rows] = codec.encode(to_unit(frames[rows]).to(device))[0].half().cpu()
        marks += [annotate(world, blocks, lost) for world, lost in zip(worlds, losses, strict=True)]
        recipes += [recipe | {"prompt": world.prompt} for recipe, world in zip(group, worlds, strict=True)]
        bar.update(len(group))
    tensors = {name: torch.stack([m[name] for m in marks]) for name in marks[0]}
    tensors |= {"shown": torch.cat(shown)} if mix.lost else {}
    return tensors | {"latents": torch.cat(latents)}, recipes


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


def _draw(rng: np.random.Generator, odds: Odds) -> int:
    weights = np.array([weight for _, weight in odds])
    return odds[int(rng.choice(len(odds), p=weights / weights.sum()))][0]
