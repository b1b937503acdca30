"""Tables of everything that was measured in a folder: markdown to read, JSON to compute with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from echo_infinity.evaluation import cost, drift, perceptual, prompt, recall
from echo_infinity.evaluation.journal import Row, read_rows, read_settings
from echo_infinity.evaluation.real import Reference, load_reference
from echo_infinity.evaluation.stats import Share, Slope

MEASURES = ("recall", "drift", "prompt", "cost", "vbench")
KEYS = {
    "recall": ("mode", "absence", "number"),
    "drift": ("stream", "minute"),
    "prompt": ("kind", "number"),
    "cost": ("machine", "blocks"),
    "vbench": ("start",),
}
_MADE_BY = {
    "truth": "the true video",
    "codec": "the true video, through the codec",
    "chance": "another scene's true video",
    "shown": "truth, then the model",
    "swapped": "truth, then the model with another rollout's memory",
    "staged": "the model; closed curtain drawn for it",
    "free": "the model, everything",
}


@dataclass
class Run:
    """What one model and policy came to; None where a measure has not been taken."""

    name: str
    settings: dict[str, Row] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    reference: Reference | None = None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's folder."""
        run = cls(folder.name)
        for measure in MEASURES:
            path = folder / f"{measure}.jsonl"
            if rows := read_rows(path):
                run.settings[measure] = read_settings(path)
                keys = KEYS[measure]
                run.rows[measure] = list({tuple(row.get(key) for key in keys): row for row in rows}.values())
        reference = run.settings.get("drift", {}).get("reference")
        if reference:
            run.reference = load_reference(folder.parent / reference)
        return run

    @cached_property
    def drift(self) -> drift.DriftScore | None:
        """Drift's figures."""
        rows = self.rows.get("drift")
        return drift.score(rows, self.settings["drift"]["prompts"], self.reference) if rows else None


def read_runs(folder: Path) -> list[Run]:
    """Return the runs in a folder, by name.

    Raises:
        ValueError: there are none.
    """
    folders = sorted({path.parent for measure in MEASURES for path in folder.glob(f"*/{measure}.jsonl")})
    runs = [run for run in map(Run.read, folders) if run.rows]
    if not runs:
        raise ValueError(f"{folder} holds no measured run: run echo-infinity eval --out {folder} first")
    return runs


def markdown(runs: Sequence[Run]) -> str:
    """Return the tables; a measure that no run has is left out."""
    parts = [_recall(runs), _drift(runs), _prompt(runs), _cost(runs), _vbench(runs), _origin(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures as JSON values, by run and measure."""
    found: dict[str, Any] = {}
    for run in runs:
        one: dict[str, Any] = {"settings": run.settings}
        rows = run.rows
        if "recall" in rows:
            one["recall"] = [asdict(cell) for cell in recall.cells(rows["recall"])]
        score = run.drift
        if score is not None:
            one["drift"] = asdict(score)
        if "prompt" in rows:
            one["prompt"] = [asdict(x) for x in prompt.adherence(rows["prompt"])]
            one["switch"] = [asdict(x) for x in prompt.switching(rows["prompt"])]
        if "cost" in rows:
            one["cost"] = [asdict(x) for x in cost.costs(rows["cost"])]
        if "vbench" in rows:
            trends = perceptual.trends(rows["vbench"])
            one["vbench"] = {k: {"first": a, "last": b, "slope": asdict(s)} for k, (a, b, s) in trends.items()}
        found[run.name] = one
    return _finite(found)


def write(runs: Sequence[Run], folder: Path) -> str:
    """Write ``report.md`` and ``report.json`` and return the former's text."""
    text = markdown(runs)
    (folder / "report.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(data(runs), indent=1) + "\n")
    return text


def _recall(runs: Sequence[Run]) -> str:
    lines = []
    controls: set[str] = set()
    for run in runs:
        for cell in recall.cells(run.rows.get("recall", [])):
            if cell.mode in recall.CONTROLS:
                if cell.mode in controls:
                    continue  # the same worlds for every run
                controls.add(cell.mode)
            name = "" if cell.mode in recall.CONTROLS else run.name
            shares = [_share(x) for x in (cell.colour, cell.shape, cell.place, cell.all)]
            strict = "" if cell.strict is None else f"{cell.strict.share:.3f}"
            counts = [str(cell.rollouts), str(cell.asked)]
            lines.append([name, _MADE_BY[cell.mode], _absence(cell), *counts, *shares, strict])
    head = ["run", "made by", "windows out of sight", "rollouts", "asked", "colour", "shape", "place", "all three"]
    note = "Shares of what was asked, with 95 % intervals (Wilson); in the last column of all rollouts."
    return _section("Recall", [*head, "colour, of all"], lines, note)


def _absence(cell: recall.Cell) -> str:
    if cell.absence is None:
        return ""
    if cell.mode != "free":
        return f"{cell.absence:g}"
    return {0: "under 1", 1: "1 to 2", 2: "2 to 4"}.get(int(cell.absence), "4 and more")


def _drift(runs: Sequence[Run]) -> str:
    slopes, verdicts, notes = [], [], []
    for run in runs:
        score = run.drift
        if score is None:
            continue
        for trend in score.trends.values():
            figures = [_number(x) for x in (trend.start, trend.end, trend.real, trend.raw)]
            ends = [_slope(x) if x else "" for x in (trend.first_hour, trend.last_hour)]
            slopes.append([run.name, trend.measure, *figures, _slope(trend.slope), *ends])
        shares = [f"{x.right} of {x.n}" for x in (score.runaway, score.frozen, score.looping)]
        motion = [_number(score.motion), _number(score.raw_motion)]
        verdicts.append([run.name, f"{score.minutes / 60:.2f}", *motion, *shares])
        notes += [f"- {run.name}, stream {i}: {'; '.join(found)}" for i, found in sorted(score.reasons.items())]
    head = ["run", "measure", "first minutes", "last minutes", "real worlds", "uncoded", "slope per hour (95 %)"]
    first = _section("Drift", [*head, "first hour", "last hour"], slopes)
    head = ["run", "hours", "motion / real", "motion / uncoded", "ran away", "frozen", "looping"]
    second = _section("Streams that went wrong", head, verdicts)
    return "\n\n".join(x for x in (first, second, "\n".join(notes)) if x)


def _prompt(runs: Sequence[Run]) -> str:
    shares, switches, controls = [], [], set()
    for run in runs:
        rows = run.rows.get("prompt", [])
        for x in prompt.adherence(rows):
            if x.kind != "steady":
                if x.kind in controls:
                    continue
                controls.add(x.kind)
            name = {"truth": "the true video", "chance": "another prompt's true video"}.get(x.kind, run.name)
            shares.append([name, str(x.all.n), *(_share(y) for y in (x.colours, x.shapes, x.alone, x.scene, x.all))])
        for s in prompt.switching(rows):
            quartiles = ["longer" if q is None else f"{q:.1f}" for q in s.quartiles]
            switches.append([run.name, s.attribute, _share(s.done), *quartiles])
    head = ["run", "rollouts", "colours", "with shapes", "nothing else", "scene", "all"]
    first = _section("Prompt", head, shares, "Rollouts in most of whose frames it is right.")
    head = ["run", "what", "shows in time", "25 % after s", "50 % after s", "75 % after s"]
    second = _section("After a prompt switch", head, switches, "Seconds until the new prompt's attributes show.")
    return "\n\n".join(x for x in (first, second) if x)


def _cost(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        for x in cost.costs(run.rows.get("cost", [])):
            times = [f"{a:.1f} ({b:.1f} - {c:.1f})" for a, b, c in (x.generate, x.decode)]
            sizes = [f"{n:,}" for n in (x.cache_bytes, x.memory_bytes, x.other_bytes)]
            lines.append([run.name, *times, f"{x.frames_per_second:.1f}", *sizes, x.machine])
    head = ["run", "ms a block (10 - 90 %)", "decoder", "frames/s", "cache bytes", "memory", "other", "machine"]
    return _section("Cost of one stream", head, lines)


def _vbench(runs: Sequence[Run]) -> str:
    lines = [
        [run.name, name, _number(first), _number(last), _slope(slope)]
        for run in runs
        for name, (first, last, slope) in perceptual.trends(run.rows.get("vbench", [])).items()
    ]
    return _section("Clips by VBench and LPIPS", ["run", "measure", "first", "last", "slope per hour (95 %)"], lines)


def _origin(runs: Sequence[Run]) -> str:
    lines = [
        [run.name, measure, settings["model"], settings["policy"], settings["fingerprint"]]
        for run in runs
        for measure, settings in run.settings.items()
    ]
    return _section("What was judged", ["run", "measure", "model", "policy", "fingerprint"], lines)


def _section(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], note: str = "") -> str:
    if not lines:
        return ""
    rows = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
    return f"## {title}\n\n" + (f"{note}\n\n" if note else "") + "\n".join(rows)


def _share(x: Share) -> str:
    if not x.n:
        return ""
    low, high = x.interval
    return f"{x.share:.3f} ({low:.3f} - {high:.3f})"


def _slope(x: Slope) -> str:
    if math.isnan(x.value):
        return ""
    return f"{x.value:+.3g} ({x.low:+.3g} .. {x.high:+.3g})"


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}"


def _finite(x: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(x, dict):
        return {str(k): _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
