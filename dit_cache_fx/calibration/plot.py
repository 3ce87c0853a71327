"""Draw a calibration. Matplotlib is imported when drawing."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

from dit_cache_fx.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: colours of the curves, in order
COLORS = ("#1f4e79", "#f2a541", "#7f9fbf")


class Curve(NamedTuple):
    """PSNR in dB over numbers of computed steps."""

    label: str
    steps: Sequence[int]
    psnr: Sequence[float]


def draw(curves: Sequence[Curve], title: str, path: str | PathLike[str] | None = None) -> Figure:
    """Draw all curves in one figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "plot() needs matplotlib: pip install 'dit_cache_fx[plot]'"
        ) from error
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for curve, color in zip(curves, COLORS, strict=False):
        axes.plot(curve.steps, curve.psnr, marker="o", color=color, label=curve.label)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel("computed steps", fontsize=8.5)
    axes.set_ylabel("PSNR to every step computed, dB", fontsize=8.5)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
