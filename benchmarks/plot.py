"""A picture of each model's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import Figures, figures, physical_limit, run_name

COLOURS = {"uncached": "#9e9e9e", "ours": "#1b6ca8", "peer": "#d98c3f", "limit": "#444444"}


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """`bench_<run>_<model>.png` for each model that has figures."""
    files = []
    for name, entry in data["models"].items():
        measured = figures(entry["rows"], data["settings"])
        rows = [row for row in measured if row.seconds and row.kind != "limit"]
        if rows:
            file = folder / f"bench_{run_name(data['settings'])}_{name}.png"
            limit = physical_limit(entry["rows"], data["settings"])
            _picture(entry["title"], rows, limit, data["settings"], file)
            files.append(file)
    return files


def _picture(
    title: str, rows: list[Figures], limit: float | None, settings: dict[str, Any], file: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: -(row.seconds or 0))
    names = [f"{row.title} ({row.computed})" for row in rows]
    colours = [COLOURS[row.kind] for row in rows]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 1.2 + 0.28 * len(rows)), sharey=True, layout="constrained"
    )
    bars = left.barh(names, [row.seconds or 0 for row in rows], color=colours)
    left.bar_label(bars, fmt=" %.2f", fontsize=7)
    if limit is not None:
        left.axvline(limit, color=COLOURS["limit"], linestyle="--", linewidth=1)
        left.set_title(f"dashed: physical limit, {limit:.2f} s", fontsize=8)
    left.set_xlabel(f"seconds for {settings['steps']} steps")
    bars = right.barh(names, [row.reused_ms or 0 for row in rows], color=colours)
    right.bar_label(
        bars, [f" {row.reused_ms:.2f}" if row.reused_ms else "" for row in rows], fontsize=7
    )
    right.set_xscale("log")
    right.set_xlabel("reused step, milliseconds (logarithmic)")
    left.tick_params(labelsize=7)
    figure.suptitle(f"{title} (in brackets: steps computed)", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
