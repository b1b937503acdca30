"""Separate the factors that made recall learnable at small scale: short runs from one start, each without one of them.

Every run is two phases of flow matching of equally many steps; only the factor in question differs. Finished runs are
kept, so that a broken command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from echo_infinity.codec import Codec
from echo_infinity.config import EchoConfig, preset
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.recall import Recall, RecallTest, cells
from echo_infinity.training.clips import MARKS, Clips, join_clips, load_clips
from echo_infinity.training.flow import FlowTrainer, FlowTraining
from echo_infinity.weights import load_checkpoint

FACTORS = {
    "positions": "positions in the write",
    "gate_bias": "gate bias 0.5 instead of 2",
    "memory_rate": "the memory's learning rate 3 times the rest's",
    "weights": "blocks in which objects come back weigh 5 times as much",
    "noise": "and are trained at high noise",
    "curriculum": "short absences first",
    "by_place": "attention starts by place, the memory as a copier",
}


@dataclass(frozen=True)
class Ablation:
    """Settings of the table.

    Args:
        steps: of each of the two phases.
        batch: clips a step.
        blocks: blocks of a clip that are used.
        graded: blocks of a clip that are graded.
        rate: peak learning rate.
        seeds: runs a row.
        scenes: held-out scenes of the recall test.
        held_out: clips at the end of the far ones that no run trains on.
    """

    steps: int = 400
    batch: int = 24
    blocks: int = 9
    graded: int = 3
    rate: float = 1e-3
    seeds: int = 1
    scenes: int = 96
    held_out: int = 96


def name_rows(alone: bool) -> dict[str, frozenset[str]]:
    """Return the rows of the table: name and the factors that are on.

    Args:
        alone: whether to add rows with one factor only.
    """
    every = frozenset(FACTORS)
    rows = {"all": every} | {f"without {name}": every - {name} for name in FACTORS} | {"none": frozenset()}
    return rows | ({f"only {name}": frozenset([name]) for name in FACTORS} if alone else {})


def set_up(config: EchoConfig, settings: Ablation, on: frozenset[str], seed: int) -> tuple[EchoConfig, FlowTraining]:
    """Return geometry and settings of a run with these factors on.

    Raises:
        ValueError: the model has no memory.
    """
    if config.memory is None:
        raise ValueError(f"{config.name} has no memory to take apart")
    memory = replace(
        config.memory, positions="positions" in on, gate_bias=0.5 if "gate_bias" in on else 2.0, frozen=False
    )
    training = FlowTraining(
        **{name: getattr(settings, name) for name in ("steps", "batch", "blocks", "graded", "rate")},
        memory_rate=3.0 if "memory_rate" in on else 1.0,
        reappear_weight=5.0 if "weights" in on else 1.0,
        reappear_noise=0.6 if "noise" in on else 0.0,
        seed=seed,
    )
    return replace(config, memory=memory), training


class Runner:
    """Runs the rows.

    Args:
        settings: of the table.
        config: the preset.
        start: model that every run starts from; its memory, if it has one, is left behind.
        near: clips with short absences.
        far: clips with long ones.
        codec: for the recall test.
        out: folder of the runs and the table.
    """

    def __init__(
        self, settings: Ablation, config: EchoConfig, start: str, near: Clips, far: Clips, codec: Codec, out: Path
    ) -> None:
        if len(far) <= settings.held_out:
            raise ValueError(f"{len(far)} far clips leave none to train on beside {settings.held_out} held out")
        self.settings, self.config, self.start, self.codec, self.out = settings, config, start, codec, out
        cut = len(far) - settings.held_out
        self.near, self.far, self.tested = near, _part(far, slice(cut)), _part(far, slice(cut, None))

    def run(self, name: str, on: frozenset[str], seed: int) -> dict[str, Any]:
        """Train and measure a row, or read what it measured before."""
        folder = self.out / f"{name.replace(' ', '-')}-{seed}"
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text())
        config, training = set_up(self.config, self.settings, on, seed)
        start = ""
        for phase, clips in enumerate((self.near if "curriculum" in on else self.far, self.far)):
            trainer = FlowTrainer(training, config, clips, folder / str(phase))
            if not trainer.resume():
                self._begin(trainer, start, "by_place" in on)
            if not trainer.train():
                raise KeyboardInterrupt
            start = str(trainer.export(self.codec))
        result = {"row": name, "seed": seed, "on": sorted(on), **self.measure(trainer, start)}
        done.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _begin(self, trainer: FlowTrainer, earlier: str, by_place: bool) -> None:
        if earlier:
            trainer.start_from(earlier)
            return
        trainer.start_from_checkpoint(load_checkpoint(self.start)._replace(memory=None))
        if by_place:
            trainer.start_by_place()

    @torch.no_grad()
    def measure(self, trainer: FlowTrainer, model: str) -> dict[str, float]:
        """Return held-out losses at the same noise for all rows, and recall of colours."""
        held = FlowTrainer(
            replace(trainer.settings, reappear_weight=1.0, reappear_noise=0.6, graded=0, bf16=False),
            trainer.config,
            self.tested,
            self.out / "unused",
        )
        held.start_from(model)
        found: dict[str, list[float]] = {}
        for first in range(0, len(self.tested), 16):
            index = torch.arange(first, min(first + 16, len(self.tested)))
            _, parts = held.loss(index, torch.Generator().manual_seed(first))
            for name, value in parts.items():
                found.setdefault(name, []).append(value)
        result = {name: sum(values) / len(values) for name, values in found.items()}
        if self.settings.scenes:
            result |= self._recall(model)
        return result

    def _recall(self, model: str) -> dict[str, float]:
        """The judge's share of right colours after an absence of twice the window, and with another scene's memory."""
        test = RecallTest(self.settings.scenes, (2,), ("shown", "swapped"), batch=min(32, self.settings.scenes))
        journal = Journal(Path(model).parent / "recall.jsonl", test.settings())
        Recall(load_checkpoint(model), "evolving", test).run(journal, lambda _: None)
        shares = {cell.mode: cell.colour.share for cell in cells(journal.rows)}
        return {f"recall_{mode}": shares[mode] for mode in test.modes}


def write_table(results: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Write ``table.md`` and ``table.json``: means over seeds, a row a set of factors; return the table."""
    columns = ("recall_shown", "recall_swapped", "reappear", "first_open", "sighted")
    shown = [name for name in columns if any(name in r for r in results)]
    lines = ["| run | " + " | ".join(shown) + " | seeds |", "|---" * (len(shown) + 2) + "|"]
    for row in dict.fromkeys(r["row"] for r in results):
        runs = [r for r in results if r["row"] == row]
        cells = [[r[name] for r in runs if name in r] for name in shown]
        means = [f"{sum(c) / len(c):.3f}" if c else "" for c in cells]
        lines.append(f"| {row} | " + " | ".join(means) + f" | {len(runs)} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(list(results), indent=1) + "\n")
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train ablate``."""
    parser.add_argument("--start", required=True, help="model that every run starts from, best one without memory")
    parser.add_argument("--near", type=Path, nargs="+", required=True, help="folders of clips with short absences")
    parser.add_argument("--far", type=Path, nargs="+", required=True, help="folders of clips with long absences")
    parser.add_argument("--codec", type=Path, default=Path("runs/codec/codec.safetensors"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs and the table")
    parser.add_argument("--alone", action="store_true", help="add rows with one factor only")
    parser.add_argument("--rows", nargs="+", default=None, help="only these rows")
    for name, value in vars(Ablation()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)


def run(args: argparse.Namespace) -> int:
    """Run the rows that are still to do, print the table; return the exit code."""
    settings = Ablation(**{name: getattr(args, name) for name in vars(Ablation())})
    rows = name_rows(args.alone)
    if unknown := [name for name in args.rows or () if name not in rows]:
        raise ValueError(f"no rows {', '.join(unknown)}; there are: {', '.join(rows)}")
    near, far = (join_clips([load_clips(f) for f in folders], settings.blocks) for folders in (args.near, args.far))
    runner = Runner(settings, preset(args.preset), args.start, near, far, Codec.load(args.codec), args.out)
    results: list[dict[str, Any]] = []
    for name in args.rows or rows:
        for seed in range(settings.seeds):
            try:
                results.append(runner.run(name, rows[name], seed))
            except KeyboardInterrupt:
                print("stopped; the same command goes on")  # noqa: T201
                return 130
            text = write_table(results, args.out)
    print(text)  # noqa: T201
    return 0


def _part(clips: Clips, rows: slice) -> Clips:
    marks = {name: getattr(clips, name)[rows] for name in MARKS}
    return Clips(clips.latents[rows], clips.shown[rows], **marks, prompts=clips.prompts[rows], clips=clips.clips[rows])
