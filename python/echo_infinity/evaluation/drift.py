"""Drift: does hour one, or twenty-four, still look and move like minute one, and like the real worlds?

Streams run side by side, freely from noise. Every minute of each is measured and forgotten, so memory stays constant;
after each minute the streams are saved, so a killed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echo_infinity.codec import SPACE_STRIDE
from echo_infinity.evaluation.features import LEVELS, block_features, frechet
from echo_infinity.evaluation.journal import Journal, Row
from echo_infinity.evaluation.loops import LoopWatch, thumbnails
from echo_infinity.evaluation.pictures import write_png
from echo_infinity.evaluation.real import ANY, Real, Reference
from echo_infinity.evaluation.sampling import Rollout, part
from echo_infinity.evaluation.stats import Share, Slope, drift_slope
from echo_infinity.finite import NonFiniteError
from echo_infinity.record import resident_bytes
from echo_infinity.state import read_state, write_state
from echo_infinity.weights import Checkpoint
from echo_infinity.worlds import World

MEASURES = (*LEVELS, "distance")
RANGE = 2.0  # a level that ends outside 1/2 .. 2 of where it began has run away
MOTION_RANGE = 4.0
DISTANCE_RANGE = 2.0
FROZEN = 0.1  # of the real worlds' motion
_EDGE = 5  # minutes at each end that are compared; a quarter of shorter runs
_SHEET = 48  # rows of the contact sheet at most


@dataclass(frozen=True)
class DriftTest:
    """What is generated.

    Args:
        minutes: of each stream.
        streams: one seed each, prompts in turn.
        seed: of the first.
        prompts: default held-out worlds, curtain, path and open in turn, half of them named.
        batch: streams side by side.

    Raises:
        ValueError: a number is below 1.
    """

    minutes: int = 60
    streams: int = 8
    seed: int = 0
    prompts: tuple[str, ...] = ()
    batch: int = 8

    def __post_init__(self) -> None:
        if min(self.minutes, self.streams, self.batch) < 1:
            raise ValueError(f"drift needs at least 1 minute, stream and batch, got {self}")

    def settings(self) -> Row:
        """What a stream's minutes depend on beside its number."""
        return {"seed": self.seed, "prompts": list(self.all_prompts()), "batch": self.batch}

    def all_prompts(self) -> tuple[str, ...]:
        """Return the prompts that streams take in turn."""
        return self.prompts or default_prompts()

    def prompt(self, stream: int) -> str:
        """Return a stream's prompt."""
        prompts = self.all_prompts()
        return prompts[stream % len(prompts)]


def default_prompts(count: int = 8) -> tuple[str, ...]:
    """Prompts of held-out worlds, curtain, path and open in turn."""
    kinds = ("curtain", "path", "open")
    return tuple(World.from_seed(1000 + i, kinds[i % 3], name_objects=i % 2 == 0).prompt for i in range(count))


class Drift:
    """The judge of one model and policy.

    Args:
        checkpoint: the model.
        policy: what it does with evicted frames.
        test: what is generated.
        reference: real clips of the prompts; None leaves the distance out.
        folder: of the streams' states and of pictures.
    """

    def __init__(
        self, checkpoint: Checkpoint, policy: str, test: DriftTest, reference: Reference | None, folder: Path
    ) -> None:
        self.checkpoint, self.policy, self.test = checkpoint, policy, test
        self.reference, self.folder = reference or {}, folder
        config = checkpoint.config
        self.per_minute = math.ceil(60 * config.fps / (4 * config.window.frames_per_block))

    def steps(self) -> int:
        """How often :meth:`run` reports progress: once a block of every batch of streams."""
        return len(self._groups()) * self.test.minutes * self.per_minute

    def blocks(self) -> int:
        """Blocks of the longest stream."""
        return self.test.minutes * self.per_minute

    def run(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Generate and measure what the journal lacks.

        Args:
            journal: gets a row a stream and minute; a stream that is not finite any more gets one that says so.
            progress: called with the number of blocks done.
        """
        for group in self._groups():
            self._run_group(group, journal, progress)

    def _groups(self) -> list[range]:
        n, batch = self.test.streams, self.test.batch
        return [range(first, min(first + batch, n)) for first in range(0, n, batch)]

    def _run_group(self, group: range, journal: Journal, progress: Callable[[int], None]) -> None:
        test = self.test
        prompts = [test.prompt(i) for i in group]
        rollout = Rollout(self.checkpoint, self.policy, prompts, [test.seed + i for i in group])
        c = self.checkpoint.config
        shape = torch.zeros(1, 1, c.model.latent_channels, c.latent_rows, c.latent_columns)
        loops = LoopWatch(len(group), thumbnails(shape).shape[1])
        state = self.folder / f"streams-{group.start}.state.safetensors"
        done, last = self._resume(state, rollout, loops, {(r["stream"], r["minute"]) for r in journal.rows}, group)
        progress(min(done, test.minutes) * self.per_minute)
        if any(row.get("failed") for row in journal.rows if row["stream"] in group):
            progress((test.minutes - done) * self.per_minute)
            return
        for minute in range(done, test.minutes):
            try:
                rows, last = self._minute(rollout, loops, minute, last, progress)
            except NonFiniteError as error:
                journal.append([{"stream": i, "minute": minute, "failed": str(error)} for i in group])
                progress((test.minutes - minute - 1) * self.per_minute)
                return
            for number, row in zip(group, rows, strict=True):
                real = self.reference.get(test.prompt(number), self.reference.get(ANY))
                row["distance"] = None if real is None else frechet(row.pop("features"), real.pool)
                row.pop("features", None)
            journal.append([{"stream": i, "minute": minute, **row} for i, row in zip(group, rows, strict=True)])
            self._save(state, rollout, loops, minute + 1, last)
            if minute % max(1, test.minutes // _SHEET) == 0 or minute == test.minutes - 1:
                write_png(self.folder / f"frames-{group.start}" / f"{minute:06d}.png", torch.cat(list(last[:, 0]), 2))

    def _minute(
        self, rollout: Rollout, loops: LoopWatch, minute: int, last: Tensor, progress: Callable[[int], None]
    ) -> tuple[list[Row], Tensor]:
        """Rows of the streams' next minute, and its last frames ``(B, 1, 3, H, W)``."""
        features: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for _ in range(self.per_minute):
            latents, frames = rollout.next_block()
            features.append(block_features(latents).cpu())
            loops.push(latents)
            joined = torch.cat([last.to(frames.device), frames], 1)  # the step between blocks is motion too
            for name, level in LEVELS.items():
                value = level(joined if name == "motion" else frames[:, ::4]).cpu()
                sums[name] = sums.get(name, torch.zeros(len(value))) + value
            last = frames[:, -1:].cpu()
            progress(1)
        kept = torch.stack(features, 1)  # (B, blocks, 3 C)
        periods, resident = loops.periods(), resident_bytes()
        return [
            {
                **{name: total[i].item() / self.per_minute for name, total in sums.items()},
                "features": kept[i],
                "period": periods[i],
                "resident": resident,
            }
            for i in range(len(kept))
        ], last

    def _save(self, state: Path, rollout: Rollout, loops: LoopWatch, minutes: int, last: Tensor) -> None:
        tensors = {f"rollout.{name}": x for name, x in rollout.tensors().items()} | {"last": last}
        tensors |= {f"loops.{name}": x for name, x in loops.tensors().items()}
        write_state(state, {"minutes": minutes, "frame": rollout.sampler.frame}, tensors)

    def _resume(
        self, state: Path, rollout: Rollout, loops: LoopWatch, measured: set[tuple[int, int]], group: range
    ) -> tuple[int, Tensor]:
        """Minutes that are done, and the last frames; none where a minute before the saved state was not measured."""
        c = self.checkpoint.config
        fresh = torch.zeros(len(group), 0, 3, c.latent_rows * SPACE_STRIDE, c.latent_columns * SPACE_STRIDE)
        saved = read_state(state) if state.is_file() else None
        if saved is None or not all((i, minute) in measured for i in group for minute in range(saved.meta["minutes"])):
            return 0, fresh.to(torch.uint8)
        rollout.load_tensors(part(saved.tensors, "rollout."), saved.meta["frame"])
        loops.load_tensors(part(saved.tensors, "loops."))
        return saved.meta["minutes"], saved.tensors["last"]


@dataclass(frozen=True)
class Trend:
    """One measure of all streams: level in the first and the last minutes, slope per hour.

    ``real`` is the level of real worlds of the same prompts through the codec, ``raw`` without it.
    """

    measure: str
    start: float
    end: float
    real: float
    raw: float
    slope: Slope
    first_hour: Slope | None  # of runs of two hours or more
    last_hour: Slope | None


@dataclass(frozen=True)
class DriftScore:
    """What a run comes to.

    Args:
        minutes: of the shortest stream.
        trends: by measure.
        motion: motion over that of the real worlds of the same prompts through the codec, mean over streams.
        raw_motion: the same over that of the real worlds themselves: a codec that flickers moves what stands still.
        runaway: streams that ran away, by the rules of docs/evaluation.md.
        frozen: streams that ended with hardly any motion.
        looping: streams that repeated themselves in the last five minutes.
        reasons: of each stream that ran away, froze, loops or failed.
    """

    minutes: int
    trends: dict[str, Trend]
    motion: float
    raw_motion: float
    runaway: Share
    frozen: Share
    looping: Share
    reasons: dict[int, list[str]]


def score(rows: Iterable[Row], prompts: Sequence[str], reference: Reference | None) -> DriftScore:
    """Sum up a journal's rows.

    Args:
        rows: a stream and minute each.
        prompts: that streams take in turn.
        reference: real clips of the prompts.

    Raises:
        ValueError: there are no rows.
    """
    rows = list(rows)
    streams = sorted({row["stream"] for row in rows})
    if not streams:
        raise ValueError("no minute has been measured yet")
    failed = {row["stream"]: row["failed"] for row in rows if row.get("failed")}
    finite = sorted((row for row in rows if not row.get("failed")), key=_minute_of)
    by_stream = {i: [row for row in finite if row["stream"] == i] for i in streams}
    minutes = min((len(x) for x in by_stream.values() if x), default=0)
    alive = [i for i in streams if by_stream[i]]
    real = {i: (reference or {}).get(prompts[i % len(prompts)], (reference or {}).get(ANY)) for i in streams}
    series = {
        name: np.array([[_number(row[name]) for row in by_stream[i][:minutes]] for i in alive]) for name in MEASURES
    }
    reasons = {i: ["not finite: " + failed[i]] for i in failed}
    for row, i in enumerate(alive):
        if found := verdicts({name: x[row] for name, x in series.items()}, real[i], by_stream[i][-_EDGE:]):
            reasons.setdefault(i, []).extend(found)

    def count(*kinds: str) -> Share:
        return Share(sum(any(r.startswith(kinds) for r in found) for found in reasons.values()), len(streams))

    trends = {name: _trend(name, x, [real[i] for i in alive]) for name, x in series.items() if len(x)}
    known = [(float(np.nanmean(x)), r) for x, i in zip(series["motion"], alive, strict=True) if (r := real[i])]
    return DriftScore(
        minutes,
        trends,
        _mean([x / r.levels["motion"] for x, r in known]),
        _mean([x / r.raw["motion"] for x, r in known]),
        count("ran away", "not finite"),
        count("frozen"),
        count("loops"),
        reasons,
    )


def verdicts(series: dict[str, np.ndarray], real: Real | None, tail: Sequence[Row] = ()) -> list[str]:
    """Say in what way a stream went wrong for good: the first minutes against the last, docs/evaluation.md.

    Args:
        series: each measure by minute.
        real: real clips of its prompt.
        tail: its last rows, for loops.
    """
    found = []
    for name in LEVELS:
        start, end = _edges(series[name])
        limit = MOTION_RANGE if name == "motion" else RANGE
        if not (start / limit <= end <= start * limit):
            found.append(f"ran away: {name} {start:.3g} -> {end:.3g}")
    if real is not None:
        start, end = _edges(series["distance"])
        if end > DISTANCE_RANGE * start and end > max(real.own_distances()):
            found.append(f"ran away: distance {start:.3g} -> {end:.3g}")
        still = _edges(series["motion"])[1]
        if still < FROZEN * real.levels["motion"]:
            found.append(f"frozen: motion {still:.3g}, real {real.levels['motion']:.3g}")
    periods = [row["period"] for row in tail if row.get("period")]
    if tail and len(periods) * 2 > len(tail):
        found.append(f"loops: every {int(np.median(periods))} blocks")
    return found


def _trend(name: str, series: np.ndarray, real: Sequence[Real | None]) -> Trend:
    hours = (np.arange(series.shape[1]) + 0.5) / 60
    edges = np.array([_edges(x) for x in series])
    known = [r for r in real if r is not None]
    if name == "distance":
        levels, raw = [float(np.mean(r.own_distances())) for r in known], []
    else:
        levels, raw = [r.levels[name] for r in known], [r.raw[name] for r in known]
    first = last = None
    if len(hours) >= 120:
        first, last = (drift_slope(hours[span], series[:, span]) for span in (slice(0, 60), slice(-60, None)))
    start, end = (float(x) for x in edges.mean(0))
    return Trend(name, start, end, _mean(levels), _mean(raw), drift_slope(hours, series), first, last)


def _edges(x: np.ndarray) -> tuple[float, float]:
    """Medians of the first and of the last minutes."""
    edge = max(1, min(_EDGE, len(x) // 4))
    return float(np.median(x[:edge])), float(np.median(x[-edge:]))


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x) if x else float("nan")


def _minute_of(row: Row) -> int:
    return row["minute"]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
