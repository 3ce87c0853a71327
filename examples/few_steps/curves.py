"""The picture of docs/how-few-steps.md: quality over computed steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from examples.few_steps.measure import COMPUTED, PUBLISHED, SHIFTS
from examples.few_steps.tables import label

INK, GREY = "#1f2933", "#9aa5b1"
LINES = {
    "NewtonCache": "#d1495b",
    PUBLISHED: "#30638e",
    "Adams-Bashforth 2, as many steps": "#6c757d",
    "Euler, as many steps": "#adb5bd",
}


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the PNG: a row for each model, a column for each shift."""
    figure, grid = plt.subplots(
        len(figures), len(SHIFTS), figsize=(11, 6.4), sharex=True, sharey=True, squeeze=False
    )
    for axes_row, (model, found) in zip(grid, figures.items(), strict=True):
        for axes, shift in zip(axes_row, SHIFTS, strict=True):
            _curves(axes, found, shift)
            axes.set_title(f"{model}, shift {shift}", fontsize=10, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("computed steps of 50", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR to the uncached image, dB", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, found: Mapping[str, Any], shift: int) -> None:
    for name, color in LINES.items():
        axes.plot(
            COMPUTED,
            found["scores"][str(shift)][name],
            "o-",
            color=color,
            label=label(name).strip("*"),
            ms=3.5,
        )
    told = found["tolerances"][str(shift)]
    x, y = [t["computed"] for t in told], [t["decibels"] for t in told]
    axes.plot(x, y, "x", color=LINES["NewtonCache"], label="NewtonCache, tolerance", ms=6)
    axes.grid(color=GREY, alpha=0.3)
    axes.set_xlim(5, 27)
