"""Plots of what was measured; matplotlib comes with the extra ``train``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo_infinity.evaluation import drift, prompt, recall
from echo_infinity.evaluation.pictures import contact_sheet, read_png, write_png
from echo_infinity.evaluation.report import Run

NEEDS = "plots need matplotlib: pip install 'echo-infinity[train]'"


def write_plots(runs: Sequence[Run], folder: Path) -> str | None:
    """Write ``recall.png``, ``drift.png`` and ``prompt.png``, and each run's contact sheet.

    Returns:
        Why there are no plots, or None.
    """
    for run in runs:
        _write_sheet(folder / run.name)
    if importlib.util.find_spec("matplotlib") is None:
        return NEEDS
    _recall([run for run in runs if "recall" in run.rows], folder / "recall.png")
    _drift([run for run in runs if "drift" in run.rows], folder / "drift.png")
    _prompt([run for run in runs if "prompt" in run.rows], folder / "prompt.png")
    return None


def _write_sheet(folder: Path) -> None:
    """A row a time, a column a stream, from the strips that drift left."""
    strips = sorted((folder / "frames-0").glob("*.png"))
    if strips:
        few = [strips[i] for i in sorted({round(x) for x in np.linspace(0, len(strips) - 1, 16)})]
        write_png(folder / "contact_sheet.png", contact_sheet([[read_png(path)] for path in few]))


def _recall(runs: Sequence[Run], path: Path) -> None:
    found = {run.name: recall.cells(run.rows["recall"]) for run in runs}
    modes = [m for m in recall.MODES if any(cell.mode == m for cells in found.values() for cell in cells)]
    if not modes:
        return
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(modes), figsize=(4.2 * len(modes), 4), sharey=True, squeeze=False)
    controls = {cell.mode: cell.colour.share for cells in found.values() for cell in cells}
    for ax, mode in zip(axes[0], modes, strict=True):
        absences = sorted({c.absence for cells in found.values() for c in cells if c.mode == mode and c.absence})
        for i, (name, cells) in enumerate(found.items()):
            some = [cell for cell in cells if cell.mode == mode and cell.absence]
            x = [absences.index(cell.absence or 0) + (i - (len(found) - 1) / 2) * 0.8 / len(found) for cell in some]
            y = [cell.colour.share for cell in some]
            spread = [[s - c.colour.interval[0] for s, c in zip(y, some, strict=True)]]
            spread.append([c.colour.interval[1] - s for s, c in zip(y, some, strict=True)])
            ax.bar(x, y, 0.75 / len(found), yerr=spread, capsize=3, label=name)
        for control, label, style in (("chance", "chance", ":"), ("codec", "truth through the codec", "--")):
            if control in controls:
                ax.axhline(controls[control], color="black", linestyle=style, label=label)
        ax.set_xticks(range(len(absences)), [f"{a:g}" for a in absences])
        ax.set(title=mode, xlabel="windows out of sight", ylim=(0, 1.05))
    axes[0][0].set_ylabel("right colour, share of what was asked")
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def _drift(runs: Sequence[Run], path: Path) -> None:
    finite = {run.name: [row for row in run.rows["drift"] if not row.get("failed")] for run in runs}
    runs = [run for run in runs if finite[run.name]]
    if not runs:
        return
    pyplot = _pyplot()
    panels = len(drift.MEASURES) + 1
    figure, axes = pyplot.subplots(panels, 1, figsize=(9, 2.3 * panels), sharex=True)
    for run in runs:
        score, rows = run.drift, finite[run.name]
        series = [[row for row in rows if row["stream"] == i] for i in sorted({row["stream"] for row in rows})]
        n = min(len(x) for x in series)
        hours = (np.arange(n) + 0.5) / 60
        axes[-1].plot(hours, [row["resident"] / 2**20 for row in series[0][:n]], label=run.name)
        for ax, name in zip(axes[:-1], drift.MEASURES, strict=True):
            values = np.array([[np.nan if row[name] is None else row[name] for row in x[:n]] for x in series])
            if np.isnan(values).all():
                continue
            low, middle, high = np.nanpercentile(values, [10, 50, 90], axis=0)
            (line,) = ax.plot(hours, middle, label=run.name)
            ax.fill_between(hours, low, high, alpha=0.15, color=line.get_color())
            if score is not None and run is runs[0] and name in score.trends:
                ax.axhline(score.trends[name].real, color="black", linestyle="--", label="real worlds")
            ax.set_ylabel(name)
            ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[0].set_title("median over streams, 10 - 90 % shaded")
    axes[-1].set(xlabel="hours", ylabel="process memory, MiB", ylim=(0, 1.2 * axes[-1].dataLim.y1))
    axes[-1].grid(alpha=0.3)
    _save(figure, path)


def _prompt(runs: Sequence[Run], path: Path) -> None:
    if not runs:
        return
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in runs:
        rows = [row for row in run.rows["prompt"] if row["kind"] == "switch"]
        for what, style in (("objects", "-"), ("scene", ":")):
            seconds = sorted(row[what] for row in rows if row[what] is not None)
            shares = np.arange(1, len(seconds) + 1) / max(1, len(rows))
            axes.step([0, *seconds], [0, *shares], style, where="post", label=f"{run.name}: {what}")
    truth = [x.shapes.share for run in runs for x in prompt.adherence(run.rows["prompt"]) if x.kind == "truth"]
    if truth:
        axes.axhline(truth[0], color="black", linestyle="--", label="real worlds, objects")
    axes.set(xlabel="seconds after the switch", ylabel="share of rollouts that show it", ylim=(0, 1.05))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
