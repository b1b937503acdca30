"""Measures of VBench and LPIPS on clips cut from long videos, where those packages and their weights are present.

The clips start every half minute; each measure is one value a start, so that it has a slope over the video. This is in
the manner of VBench-Long, whose own suite of prompts and weighting is not reproduced here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_infinity.codec import to_unit
from echo_infinity.evaluation.journal import Journal, Row
from echo_infinity.evaluation.sampling import Rollout
from echo_infinity.evaluation.stats import Slope, drift_slope
from echo_infinity.video import open_writer
from echo_infinity.weights import Checkpoint

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
LPIPS = "lpips_per_second"  # between frames a second apart: how much changes, as people see it
_EVERY = 30  # seconds between clips' starts
_SECONDS = 5


@dataclass(frozen=True)
class PerceptualTest:
    """What is generated: videos of ``minutes`` minutes, one a prompt.

    Raises:
        ValueError: no prompt, or less than a minute.
    """

    prompts: tuple[str, ...]
    minutes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.minutes < 1:
            raise ValueError(f"vbench needs at least one prompt and one minute, got {self}")

    def settings(self) -> Row:
        """What a clip depends on beside its start."""
        return {"prompts": list(self.prompts), "seed": self.seed}


def why_not() -> str | None:
    """Return which packages are missing, or None."""
    missing = [name for name in ("vbench", "lpips") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}; their weights are downloaded apart"


class Perceptual:
    """The judge of one model and policy.

    Args:
        checkpoint: the model.
        policy: what it does with evicted frames.
        test: what is generated.
        folder: of the clips.

    Raises:
        ValueError: a package is missing; says which.
    """

    def __init__(self, checkpoint: Checkpoint, policy: str, test: PerceptualTest, folder: Path) -> None:
        if reason := why_not():
            raise ValueError(reason)
        self.checkpoint, self.policy, self.test, self.folder = checkpoint, policy, test, folder
        self.starts = range(0, 60 * test.minutes - _SECONDS, _EVERY)

    def steps(self) -> int:
        """How often :meth:`run` reports progress: once a clip and once a start."""
        return len(self.starts) * (len(self.test.prompts) + 1)

    def blocks(self) -> int:
        """Blocks of the longest stream."""
        c = self.checkpoint.config
        return math.ceil(60 * self.test.minutes * c.fps / (4 * c.window.frames_per_block)) + 1

    def run(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Cut the clips that are not there and measure the starts that the journal lacks.

        Raises:
            ValueError: a package can't load its weights; says what it said.
        """
        for number, prompt in enumerate(self.test.prompts):
            self._cut(number, prompt, progress)
        done = {row["start"] for row in journal.rows}
        for start in self.starts:
            if start not in done:
                journal.append([{"start": start, **self._measure(start)}])
            progress(1)

    def _cut(self, number: int, prompt: str, progress: Callable[[int], None]) -> None:
        paths = [self._path(start, number) for start in self.starts]
        if all(path.is_file() for path in paths):
            progress(len(paths))
            return
        rollout = Rollout(self.checkpoint, self.policy, [prompt], [self.test.seed + number])
        fps = self.checkpoint.config.fps
        frames: Tensor = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
        first = 0  # number of frames[0] in the video
        for start, path in zip(self.starts, paths, strict=True):
            while first + len(frames) < (start + _SECONDS) * fps:
                new = rollout.next_block()[1][0].cpu()
                frames = torch.cat([frames, new]) if len(frames) else new
                drop = min(len(frames), max(0, start * fps - first))
                first, frames = first + drop, frames[drop:]
            self._write(path, frames[start * fps - first :][: _SECONDS * fps])
            progress(1)

    def _write(self, path: Path, frames: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"part-{path.name}")
        height, width = frames.shape[2:]
        fps = self.checkpoint.config.fps
        with open_writer(partial, width=width, height=height, fps=fps, overwrite=True) as writer:
            writer.write(frames.permute(0, 2, 3, 1).contiguous())
        partial.replace(path)

    def _path(self, start: int, number: int) -> Path:
        return self.folder / f"{start:06d}" / f"{number:03d}.mp4"

    def _measure(self, start: int) -> Row:
        try:
            return {LPIPS: self._lpips(start), **self._vbench(start)}
        except (OSError, RuntimeError) as error:
            raise ValueError(f"vbench or lpips could not load what they need: {error}") from error

    def _vbench(self, start: int) -> Row:
        package: Any = importlib.import_module("vbench")
        out, name = self.folder / "vbench", f"start-{start}"
        info = Path(package.__file__).parent / "VBench_full_info.json"
        judge = package.VBench(torch.device(self._device()), str(info), str(out))
        folder = self._path(start, 0).parent
        judge.evaluate(videos_path=str(folder), name=name, dimension_list=list(DIMENSIONS), mode="custom_input")
        results = json.loads((out / f"{name}_eval_results.json").read_text())
        return {dimension: float(results[dimension][0]) for dimension in DIMENSIONS}

    @torch.inference_mode()
    def _lpips(self, start: int) -> float:
        package: Any = importlib.import_module("lpips")
        judge = package.LPIPS(net="alex", verbose=False).eval().to(self._device())
        values = []
        for number in range(len(self.test.prompts)):
            frames = _read(self._path(start, number))[:: self.checkpoint.config.fps]
            unit = to_unit(frames).to(self._device())
            values.append(judge(unit[1:], unit[:-1]).mean().item())
        return float(np.mean(values))

    def _device(self) -> torch.device:
        return next(self.checkpoint.model.parameters()).device


def trends(rows: Iterable[Row]) -> dict[str, tuple[float, float, Slope]]:
    """Each measure's first and last value and its slope per hour, from a journal's rows."""
    rows = sorted(rows, key=lambda row: row["start"])
    hours = np.array([row["start"] / 3600 for row in rows])
    found = {}
    for name in (*DIMENSIONS, LPIPS) if rows else ():
        values = np.array([row[name] for row in rows])
        found[name] = float(values[0]), float(values[-1]), drift_slope(hours, values[None])
    return found


def _read(path: Path) -> Tensor:
    """Frames ``(N, 3, H, W)`` uint8 of a video."""
    import av

    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)
