"""Draw the last generation from its `CacheReport`. Matplotlib is imported when drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from dit_cache_fx.errors import DitCacheError, MissingPackageError
from dit_cache_fx.report.cache_report import CacheReport
from dit_cache_fx.runtime.step_record import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the actions of a block on a step, and their colours
ACTIONS = ("computed", "reused", "predicted", "never cached")
COLORS = ("#1f4e79", "#dfe5ec", "#f2a541", "#7f9fbf")
INK = "#222222"

_LINE = "#c0392b"
#: the largest number of step maps in a figure
_MOST_MAPS = 8
#: the largest number of block rows with a number
_MOST_LABELS = 12
#: a branch: its graph, its cache context, its index among the context's branches
BranchKey = tuple[int, str | None, int]


def draw(report: CacheReport, path: str | PathLike[str] | None = None) -> Figure:
    """Draw a step map for each group of equal branches, and the rule's measurements."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "plot() needs matplotlib: pip install 'dit_cache_fx[plot]'"
        ) from error
    if not report.timeline:
        raise DitCacheError("nothing to draw yet: call the cached model first")
    rows = list(_rows(report))
    heights = [height for _, _, height in rows]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights, sharex=True)
    for (title, records, _), row in zip(rows, axes[:, 0], strict=True):
        if title is None:
            draw_measured(row, records, report.threshold)
        else:
            draw_map(row, report, records, title)
    axes[-1, 0].set_xlabel("step", fontsize=8.5)
    figure.legend(handles=legend(report), loc="outside upper right", ncols=4, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def branches(timeline: Sequence[StepRecord]) -> dict[BranchKey, list[StepRecord]]:
    """The calls of each branch, in order."""
    found: dict[BranchKey, list[StepRecord]] = {}
    for record in timeline:
        found.setdefault((record.graph, record.context, record.branch), []).append(record)
    return found


def step_map(report: CacheReport, records: Sequence[StepRecord], steps: int) -> list[list[int]]:
    """Return an index into `ACTIONS` for every block (in order) and step; -1: not called."""
    done = {record.step: ACTIONS.index(record.action) for record in records}
    called = [done.get(step, -1) for step in range(steps)]
    never = [-1 if action < 0 else ACTIONS.index("never cached") for action in called]
    return [
        called if block in report.cached_blocks.get(name, ()) else never
        for name, count in report.blocks.items()
        for block in range(count)
    ]


def draw_map(
    axes: Axes, report: CacheReport, records: Sequence[StepRecord], title: str, steps: int = 0
) -> None:
    """Draw the step map of one branch: rows are blocks, columns at least `steps` steps."""
    from matplotlib.colors import ListedColormap

    steps = max(steps, 1 + max(record.step for record in report.timeline))
    actions = step_map(report, records, steps)
    axes.pcolormesh(
        [[float("nan") if action < 0 else action for action in row] for row in actions],
        cmap=ListedColormap(COLORS),
        vmin=-0.5,
        vmax=len(ACTIONS) - 0.5,
        edgecolors="white",
        linewidth=0.5 if steps * len(actions) < 2500 else 0,
    )
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    labels = list(_labels(report))
    every = -(-len(labels) // _MOST_LABELS)
    axes.set_yticks([row + 0.5 for row in range(0, len(labels), every)], labels[::every])
    _step_ticks(axes, steps)


def draw_measured(axes: Axes, records: Sequence[StepRecord], threshold: float | None) -> None:
    """Draw the rule's measurement of each step; the step computed if it reached the threshold."""
    known = [(r.step + 0.5, r.measured) for r in records if r.measured is not None]
    axes.bar(
        [step for step, _ in known],
        [value for _, value in known],
        width=0.8,
        color=[COLORS[ACTIONS.index(r.action)] for r in records if r.measured is not None],
        edgecolor=COLORS[0],
        linewidth=0.5,
    )
    if threshold is not None:
        axes.axhline(threshold, color=_LINE, linewidth=1, linestyle="--")
        axes.set_title(f"measured by the rule, threshold {threshold:g}", fontsize=9.5, loc="left")
    _step_ticks(axes, 1 + max(record.step for record in records))
    axes.set_ylabel("measured", fontsize=8.5)


def legend(report: CacheReport) -> list[Any]:
    """Return a patch for each action in the generation."""
    from matplotlib.patches import Patch

    present = {record.action for record in report.timeline}
    cached = sum(map(len, report.cached_blocks.values()))
    if cached < sum(report.blocks.values()):
        present.add("never cached")
    return [Patch(color=COLORS[i], label=name) for i, name in enumerate(ACTIONS) if name in present]


def _rows(report: CacheReport) -> Iterator[tuple[str | None, list[StepRecord], float]]:
    """Yield each axes from the top: title of a step map (None: measurements), calls, inches."""
    height = 0.9 + 0.14 * min(30, sum(report.blocks.values()))
    groups = _alike(branches(report.timeline))
    graphs = {record.graph for record in report.timeline}
    for keys, records in groups[:_MOST_MAPS]:
        computed = len({r.step for r in records if r.action == "computed"})
        steps = len({record.step for record in records})
        plain = len(groups) == 1 and len(keys) == 1 and keys[0][1] is None
        who = "" if plain else f"{_names(keys, len(graphs) > 1)}: "
        yield f"{who}{computed} of {steps} steps computed", records, height
        if any(record.measured is not None for record in records):
            yield None, records, 1.6


def _alike(
    found: dict[BranchKey, list[StepRecord]],
) -> list[tuple[list[BranchKey], list[StepRecord]]]:
    """Group the branches with equal actions and measurements."""
    groups: dict[object, tuple[list[BranchKey], list[StepRecord]]] = {}
    for key, records in found.items():
        same = tuple((record.step, record.action, record.measured) for record in records)
        groups.setdefault(same, ([], records))[0].append(key)
    return list(groups.values())


def _names(keys: Sequence[BranchKey], several_graphs: bool) -> str:
    if len(keys) > 2:
        return f"{len(keys)} branches"
    names = []
    for graph, context, branch in keys:
        name = f"branch {branch}" if context is None else repr(context)
        names.append(f"{name} of graph {graph}" if several_graphs else name)
    return ", ".join(names)


def _labels(report: CacheReport) -> Iterator[str]:
    for name, count in report.blocks.items():
        for block in range(count):
            yield f"{name}.{block}" if block == 0 else str(block)


def _step_ticks(axes: Axes, steps: int) -> None:
    ticks = range(0, steps, max(1, steps // 10))
    axes.set_xticks([step + 0.5 for step in ticks], [str(step) for step in ticks])
    axes.tick_params(length=0, labelsize=7.5, labelbottom=True)
    axes.spines[:].set_visible(False)
