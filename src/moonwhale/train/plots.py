"""Plots over the steps of a run. They leave matplotlib's global state alone: no pyplot, no change of backend."""

import os
import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def step_plot(y_labels: list[str], height_ratios: list[int], height: float) -> tuple["Figure", list["Axes"]]:
    """An empty figure 8 inches wide and `height` high, with one panel per label and the optimizer step as x-axis.

    The first panel, which holds the main curves, has a grid.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(len(y_labels), 1, sharex=True, height_ratios=height_ratios)
    for panel, label in zip(panels, y_labels, strict=True):
        panel.set_ylabel(label)
    panels[0].grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    return figure, list(panels)


def save_plot(figure: "Figure", path: Path) -> None:
    """Writes a figure of `step_plot` as PNG. A killed process leaves the old file, never half of a new one."""
    figure.axes[0].legend(frameon=False)
    figure.align_ylabels()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
