"""The demo's picture: samples by system and block x step maps of what was computed."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn import functional as F

from dit_cache_fx.report.plot import ACTIONS, COLORS, INK, draw_map
from examples.digits.running import Run
from examples.digits.table import psnr

COLUMNS = 10  # pictures shown of each run
ZOOM = 8
GAP = 6  # between pictures, in enlarged pixels

Panel = tuple[str, list[Run]]  # a title and the runs under it


def strip(pictures: Tensor) -> npt.NDArray[np.float32]:
    """The first pictures [B, 1, 8, 8] side by side, enlarged: [8 * ZOOM, (8 * ZOOM + GAP) * n]."""
    large = F.interpolate(pictures[:COLUMNS], scale_factor=ZOOM, mode="bicubic").clamp(-1, 1)
    framed = F.pad(large, (0, GAP), value=float("nan"))  # drawn as white
    return np.concatenate(list(framed[:, 0].numpy()), axis=1)


def draw_strip(axes: Axes, run: Run, target: Run, named: bool) -> None:
    """One row of samples with the run's name and its PSNR to the target."""
    axes.imshow(strip(run.pictures), cmap="gray", vmin=-1, vmax=1, aspect="equal")
    axes.set_axis_off()
    note = "target" if run is target else f"{psnr(run.pictures, target.pictures):.1f} dB"
    style = {"transform": axes.transAxes, "va": "center", "fontsize": 9, "color": INK}
    axes.text(1.01, 0.5, note, ha="left", **style)
    if named:
        axes.text(-0.02, 0.5, run.system.name, ha="right", **style)


def draw_step_map(axes: Axes, run: Run) -> None:
    """The block x step map of a cached run."""
    assert run.report is not None
    steps = run.system.steps
    title = f"{run.system.name}: {run.computed} of {steps} steps computed"
    draw_map(axes, run.report, run.report.timeline, title, steps)
    axes.set_xlabel("step", fontsize=8.5)


def draw_panels(figure: SubFigure, target: Run, panels: list[Panel]) -> None:
    """A column of sample rows for every panel, the target on top."""
    rows = 1 + max(len(runs) for _, runs in panels)
    grid = figure.add_gridspec(
        rows, len(panels), left=0.185, right=0.945, top=0.86, bottom=0.02, hspace=0.12, wspace=0.17
    )
    for column, (title, runs) in enumerate(panels):
        for row, run in enumerate([target, *runs]):
            axes = figure.add_subplot(grid[row, column])
            draw_strip(axes, run, target, named=column == 0)
            if row == 0:
                axes.set_title(title, fontsize=11, fontweight="bold", color=INK, pad=8)


def draw_maps(figure: SubFigure, runs: list[Run]) -> None:
    """The step maps, two in a row, with their legend."""
    grid = figure.add_gridspec(
        rows_of_maps(runs), 2, left=0.05, right=0.98, top=0.83, bottom=0.1, hspace=0.62, wspace=0.1
    )
    for index, run in enumerate(runs):
        draw_step_map(figure.add_subplot(grid[index // 2, index % 2]), run)
    title = "What each block did at each step"
    figure.text(0.05, 0.95, title, fontsize=11, fontweight="bold", color=INK, va="center")
    figure.legend(
        handles=[
            Patch(color=color, label=name) for color, name in zip(COLORS, ACTIONS, strict=True)
        ],
        loc="upper right",
        bbox_to_anchor=(0.98, 1.0),
        ncols=len(ACTIONS),
        frameon=False,
        fontsize=9.5,
    )


def rows_of_maps(runs: list[Run]) -> int:
    return (len(runs) + 1) // 2


def draw(path: Path, target: Run, panels: list[Panel], maps: list[Run]) -> None:
    """Write the PNG: panels of samples above step maps."""
    heights = [
        0.5 * (1 + max(len(runs) for _, runs in panels)) + 0.7,
        1.95 * rows_of_maps(maps) + 0.7,
    ]
    figure = plt.figure(figsize=(13.5, sum(heights)), facecolor="white")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    draw_panels(parts[0, 0], target, panels)
    draw_maps(parts[1, 0], maps)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
