"""What every training run shares: steps with a progress bar, a checkpoint that resumes bit for bit, log and plot."""

from __future__ import annotations

import csv
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from echo_infinity.ranks import Ranks
from echo_infinity.training.distributed import spread, whole
from echo_infinity.training.plots import plot_lines
from echo_infinity.weights import read_tensors, text_metadata, write_tensors


class Trainer(ABC):
    """A run in a folder: ``checkpoint.safetensors``, ``log.csv`` and ``loss.png``.

    Args:
        settings: a dataclass with ``steps``; a checkpoint written with others is refused.
        config: what else fixes the run, as text; likewise.
        out: the folder.
        optimiser: of the trained weights.
        ranks: the processes that share the run; the first one writes its files.
        others: further optimisers, by name.
    """

    name: ClassVar[str]  # on the progress bar
    curves: ClassVar[Sequence[str]]  # columns of the log that are shown and drawn
    panels: ClassVar[Mapping[str, Sequence[str]]] = {}  # further plots: file and columns
    extendable: ClassVar[bool] = False  # whether a longer run may go on from a shorter one's checkpoint

    def __init__(
        self,
        settings: Any,
        config: str,
        out: Path,
        optimiser: Optimizer,
        ranks: Ranks | None = None,
        others: Mapping[str, Optimizer] | None = None,
    ) -> None:
        self.settings, self.out, self.optimiser, self.step = settings, Path(out), optimiser, 0
        self.ranks = Ranks() if ranks is None else ranks
        self.optimisers = {"adam": optimiser, **(others or {})}
        self.log: list[dict[str, float]] = []
        self.why_ended = ""  # why the run ends before its last step
        self._config = config

    @abstractmethod
    def take_step(self) -> dict[str, float]:
        """Update the weights once; return what the log keeps of it, the columns of ``curves`` among it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run but the optimiser's, by name."""

    @abstractmethod
    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept."""
        return self.out / "checkpoint.safetensors"

    def train(self, until: int | None = None, save_every: int = 100) -> bool:
        """Take steps up to ``until`` (by default all); save now and then, at the end and on Ctrl-C.

        Returns:
            Whether the run went through.
        """
        until = self.settings.steps if until is None else until
        shown: dict[str, str] = {}
        bar = tqdm(total=until, initial=self.step, desc=self.name, mininterval=5.0, disable=self.ranks.rank > 0)
        try:
            while self.step < until and not self.why_ended:
                began = time.perf_counter()
                row = self.take_step()
                self.step += 1
                self.log.append({"step": self.step, **row, "seconds": time.perf_counter() - began})
                bar.update()
                shown |= {k: f"{row[k]:.3g}" for k in self.curves if k in row}
                bar.set_postfix(shown, refresh=False)
                if self.step % save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            return False
        finally:
            bar.close()
            self.save()
        return True

    def say_goodbye(self, done: bool) -> int:
        """Tell how the run ended, where that is not at its last step; return the command's exit code."""
        if self.why_ended and self.ranks.rank == 0:
            print(f"ended at step {self.step}: {self.why_ended}")  # noqa: T201
        if not done and self.ranks.rank == 0:
            print(f"stopped at step {self.step}; the same command goes on from {self.checkpoint}")  # noqa: T201
        return 0 if done else 130

    def set_rate(self, peak: float, warmup: int, floor: float) -> None:
        """Set this step's learning rate: linear warm-up, then a cosine to ``floor`` of ``peak``; times each group's
        ``factor``, where it has one."""
        warm = min(1.0, (self.step + 1) / warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.settings.steps)))
        for group in self.optimiser.param_groups:
            group["lr"] = peak * warm * (floor + (1 - floor) * cosine) * group.get("factor", 1.0)

    def save(self) -> None:
        """Write weights, optimiser, step and log, the checkpoint atomically."""
        tensors = dict(self.tensors())
        for kind, optimiser in self.optimisers.items():
            for i, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"{kind}.{i}.{name}": x for name, x in entry.items()}
        complete = {name: whole(x).contiguous() for name, x in tensors.items()}
        if self.ranks.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            metadata = {"settings": json.dumps(asdict(self.settings)), "config": self._config}
            metadata |= {"step": str(self.step), "log": json.dumps(self.log)}
            write_tensors(self.checkpoint, complete, metadata)
            if self.log:
                self._write_log()
        self.ranks.wait()  # so that every process finds the file when it looks for it

    def _write_log(self) -> None:
        columns = list(dict.fromkeys(name for row in self.log for name in row))
        with open(self.out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.log)
        plot_lines(self.log, self.curves, self.out / "loss.png", f"{self.name}: loss by step")
        for name, shown in self.panels.items():
            if any(column in row for row in self.log for column in shown):
                plot_lines(self.log, shown, self.out / name, f"{self.name} by step", scale="linear")

    def resume(self) -> bool:
        """Go on from the checkpoint if there is one, with the steps that an unbroken run takes; say whether there was.

        Raises:
            ValueError: the checkpoint can't be read, or was made with other settings or another configuration.
        """
        if not self.checkpoint.is_file():
            return False
        metadata, tensors = text_metadata(self.checkpoint), read_tensors(self.checkpoint)
        # A setting that did not exist then was at what is now its default.
        theirs, mine = asdict(type(self.settings)()) | json.loads(metadata["settings"]), asdict(self.settings)
        if self.extendable:
            theirs["steps"] = mine["steps"]
        for what, old, new in (("settings", theirs, mine), ("config", metadata["config"], self._config)):
            if old != json.loads(json.dumps(new)):
                raise ValueError(
                    f"{self.checkpoint} was made with {what} {old}, this run has {new}; "
                    "use the same options, another --out, or --restart"
                )
        self.step, self.log = int(metadata["step"]), json.loads(metadata["log"])
        kinds = tuple(f"{kind}." for kind in self.optimisers)
        self.load_tensors({name: x for name, x in tensors.items() if not name.startswith(kinds)})
        for kind, optimiser in self.optimisers.items():
            state, trained = optimiser.state_dict(), [x for g in optimiser.param_groups for x in g["params"]]
            for name, x in tensors.items():
                if name.startswith(f"{kind}."):
                    _, i, key = name.split(".")
                    state["state"].setdefault(int(i), {})[key] = spread(x, trained[int(i)])
            optimiser.load_state_dict(state)
        return True
