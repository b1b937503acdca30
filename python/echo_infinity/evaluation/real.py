"""What drift is measured against: clips of the real worlds of the same prompts, or a folder of real videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as nnf
from torch import Tensor

from echo_infinity.codec import TIME_STRIDE, Codec, to_uint8, to_unit
from echo_infinity.evaluation.features import LEVELS, block_features, frechet
from echo_infinity.weights import read_tensors, text_metadata, write_tensors
from echo_infinity.worlds import FPS, World, block_start
from echo_infinity.worlds.curtain import FRAMES_PER_BLOCK

ANY = ""  # the prompt of clips that have none


@dataclass(frozen=True)
class Real:
    """Real clips of one prompt, each a minute or so.

    Args:
        features: ``(clips, blocks, 3 C)`` of the codec's latents.
        levels: mean of each measure over clips, through the codec: the best that a generator can show.
        raw: the same without the codec.
    """

    features: Tensor
    levels: dict[str, float]
    raw: dict[str, float]

    @property
    def pool(self) -> Tensor:
        """All blocks, ``(n, 3 C)``."""
        return self.features.flatten(0, 1)

    def own_distances(self) -> list[float]:
        """Return each clip's distance from the others: what a real video scores."""
        count = len(self.features)
        return [frechet(self.features[i], self.features[torch.arange(count) != i].flatten(0, 1)) for i in range(count)]


Reference = dict[str, Real]
"""Real clips by prompt; those under ``ANY`` serve every prompt."""


def real_worlds(
    codec: Codec, prompts: Sequence[str], clips: int, blocks: int, folder: Path, progress: Callable[[int], None]
) -> Path:
    """Measure real worlds of each prompt; what the file has already is not measured again.

    Args:
        codec: of the model.
        prompts: of the worlds.
        clips: worlds of each prompt, at least two.
        blocks: of three latent frames in each.
        folder: where the file is kept.
        progress: called with 1 after each prompt.

    Returns:
        The file, for :func:`load_reference`.
    """
    path = folder / f"real-{fingerprint(codec)}-{clips}x{blocks}.safetensors"
    known = load_reference(path) if path.is_file() else {}
    for prompt in dict.fromkeys(prompts):
        if prompt not in known:
            frames = (World.from_prompt(prompt, seed=7000 + i).render(0, block_start(blocks)) for i in range(clips))
            known[prompt] = _measure(codec, frames, FRAMES_PER_BLOCK)
            _save(path, known)
        progress(1)
    return path


def real_clips(codec: Codec, videos: Path, size: tuple[int, int], frames_per_block: int, folder: Path) -> Path:
    """Measure the first minute of each video in a folder.

    Args:
        codec: of the model.
        videos: folder of mp4, mov, mkv or webm files.
        size: height and width that they are scaled and cropped to.
        frames_per_block: latent frames.
        folder: where the file is kept.

    Returns:
        The file, for :func:`load_reference`.

    Raises:
        ValueError: fewer than two videos, or one shorter than two blocks.
    """
    paths = sorted(path for path in videos.glob("*") if path.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm"))
    if len(paths) < 2:
        raise ValueError(f"{videos} holds {len(paths)} videos: drift needs at least two real ones to compare with")
    names = hashlib.sha256("".join(f"{x.name}{x.stat().st_size}" for x in paths).encode()).hexdigest()[:8]
    path = folder / f"real-{fingerprint(codec)}-{names}.safetensors"
    if not path.is_file():
        clips = (_read(video, size, frames_per_block) for video in paths)
        _save(path, {ANY: _measure(codec, clips, frames_per_block)})
    return path


def load_reference(path: Path) -> Reference:
    """Read what :func:`real_worlds` or :func:`real_clips` wrote.

    Raises:
        ValueError: the file is missing or corrupt.
    """
    known: dict[str, Any] = json.loads(text_metadata(path)["prompts"])
    tensors = read_tensors(path)
    return {prompt: Real(tensors[str(i)], *levels) for i, (prompt, levels) in enumerate(known.items())}


def fingerprint(codec: Codec) -> str:
    """Hash of a codec's weights."""
    digest = hashlib.sha256()
    for name, x in sorted(codec.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def _measure(codec: Codec, clips: Iterator[Tensor], per: int) -> Real:
    features: list[Tensor] = []
    levels: dict[str, list[float]] = {name: [] for name in LEVELS}
    raw: dict[str, list[float]] = {name: [] for name in LEVELS}
    device = next(codec.parameters()).device
    for frames in clips:
        latents, _ = codec.encode(to_unit(frames.to(device))[None])
        seen, _ = codec.decode(latents)
        features.append(block_features(latents[0].unflatten(0, (-1, per))).cpu())
        for name, level in LEVELS.items():
            levels[name].append(level(to_uint8(seen)).item())
            raw[name].append(level(frames[None].to(device)).item())
    shortest = min(len(x) for x in features)
    mean = {name: sum(values) / len(values) for name, values in levels.items()}
    mean_raw = {name: sum(values) / len(values) for name, values in raw.items()}
    return Real(torch.stack([x[:shortest] for x in features]), mean, mean_raw)


def _read(path: Path, size: tuple[int, int], per: int) -> Tensor:
    """Frames ``(N, 3, H, W)`` uint8 of a video's first minute, N a whole number of blocks."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
            scale = max(size[0] / picture.shape[2], size[1] / picture.shape[3])
            height, width = (max(a, round(b * scale)) for a, b in zip(size, picture.shape[2:], strict=True))
            picture = nnf.interpolate(picture, (height, width), mode="bilinear", antialias=True)
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
            frames.append(picture[0, :, top : top + size[0], left : left + size[1]].round().to(torch.uint8))
            if len(frames) == 60 * FPS:
                break
    blocks = (len(frames) + TIME_STRIDE - 1) // (per * TIME_STRIDE)
    if blocks < 2:
        raise ValueError(f"{path} has {len(frames)} frames: too short, two blocks are {2 * per * TIME_STRIDE - 3}")
    return torch.stack(frames[: blocks * per * TIME_STRIDE - (TIME_STRIDE - 1)])


def _save(path: Path, known: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {str(i): real.features.contiguous() for i, real in enumerate(known.values())}
    prompts = {prompt: [real.levels, real.raw] for prompt, real in known.items()}
    write_tensors(path, tensors, {"prompts": json.dumps(prompts)})
