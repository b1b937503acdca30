"""A cache of what the teacher does from noise to clip, at the student's noise levels: what a student starts from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from echo_infinity.ranks import Ranks
from echo_infinity.training.denoiser import Denoiser


@dataclass(frozen=True)
class Trajectories:
    """``states`` is ``(N, K + 1, F, C, h, w)`` float16: the clip at each of K noise levels, then clean."""

    states: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Paths:
    """How trajectories are made.

    Args:
        sigmas: K falling noise levels; noise is the state at the first.
        substeps: equal Euler steps from each level to the next, and from the last to 0.
        guidance: scale of classifier-free guidance.
        seed: of noise and prompts.
        batch: clips at once, a file each.
    """

    sigmas: tuple[float, ...]
    substeps: int = 12
    guidance: float = 3.0
    seed: int = 0
    batch: int = 8


@torch.no_grad()
def follow(teacher: Denoiser, noise: Tensor, prompts: Sequence[str], paths: Paths) -> Tensor:
    """Return the teacher's path from noise ``(B, F, C, h, w)``, at each level and clean: ``(B, K + 1, F, C, h, w)``."""
    x, states = noise, [noise]
    for start, end in zip(paths.sigmas, [*paths.sigmas[1:], 0.0], strict=True):
        step = (end - start) / paths.substeps
        for i in range(paths.substeps):
            level = torch.full((len(x),), start + i * step, device=x.device)
            x = x + step * teacher.guided_flow(x, level, list(prompts), paths.guidance)
        states.append(x)
    return torch.stack(states, dim=1)


def build_trajectories(
    teacher: Denoiser, fingerprint: str, prompts: Sequence[str], paths: Paths, out: Path, count: int, ranks: Ranks
) -> Trajectories:
    """Make a cache, or what it lacks, and return it; finished batches are kept, so that a broken run goes on.

    Args:
        teacher: a bidirectional model, whole in every process.
        fingerprint: of the teacher.
        prompts: to draw from.
        paths: how they are made.
        out: folder.
        count: number of trajectories, rounded up to whole batches.
        ranks: the processes that share the work.

    Raises:
        ValueError: the folder holds trajectories of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"teacher": fingerprint, **vars(paths)})
    note = out / "settings.json"
    if note.is_file() and note.read_text() != settings:
        raise ValueError(f"{out} holds trajectories of {note.read_text()}, not of {settings}; use another folder")
    ranks.wait()
    if ranks.rank == 0:
        note.write_text(settings)
    files = [out / f"batch-{number:05d}.safetensors" for number in range(-(-count // paths.batch))]
    mine = range(ranks.rank, len(files), ranks.world)
    for number in tqdm(mine, desc="trajectories", mininterval=2.0, disable=ranks.rank > 0):
        if not files[number].is_file():
            _write(files[number], teacher, prompts, paths, number)
    ranks.wait()
    states, chosen = [], []
    for path in files:
        with safe_open(path, "pt") as file:
            states.append(file.get_tensor("states"))
            chosen += json.loads(file.metadata()["prompts"])
    return Trajectories(torch.cat(states), chosen)


def _write(path: Path, teacher: Denoiser, prompts: Sequence[str], paths: Paths, number: int) -> None:
    c, generator = teacher.config, torch.Generator().manual_seed((paths.seed << 32) + number)
    picked = [prompts[i] for i in torch.randint(len(prompts), (paths.batch,), generator=generator).tolist()]
    shape = (paths.batch, teacher.frames, c.model.latent_channels, c.latent_rows, c.latent_columns)
    noise = torch.randn(shape, generator=generator).to(teacher.geometry.device)
    states = follow(teacher, noise, picked, paths).half().cpu()
    partial = path.with_suffix(".partial")
    save_file({"states": states}, partial, metadata={"prompts": json.dumps(picked)})
    os.replace(partial, path)
