"""Training curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_lines(
    rows: Sequence[Mapping[str, float]], columns: Sequence[str], path: Path, title: str, scale: str = "log"
) -> None:
    """Draw columns of a log over its steps, smoothed; does nothing where matplotlib is not installed.

    Args:
        rows: one mapping a step with ``step`` and, where they occurred, the columns.
        columns: what to draw.
        path: PNG to write.
        title: above the plot.
        scale: of the vertical axis, "log" for losses or "linear".
    """
    try:
        import matplotlib
    except ImportError:  # plots are an extra; the log itself is always written
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in columns:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if not points:
            continue
        width = max(1, len(points) // 60)
        smooth = [
            sum(v for _, v in points[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width))
            for i in range(len(points))
        ]
        axes.plot([step for step, _ in points], smooth, label=name)
    axes.set(xlabel="step", ylabel="loss" if scale == "log" else "", title=title, yscale=scale)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
