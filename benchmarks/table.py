"""The tables, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import STEPS, Figures, best, figures, physical_limit, run_name
from benchmarks.systems import ROWS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEAD = (
    "system",
    "50 steps, s",
    "x limit",
    "computed step, ms",
    "reused step, ms",
    "reused / computed",
    "steps computed",
    "compile, s",
    "graphs",
    "breaks",
    "recompiles",
    "cache, MiB",
    "peak, MiB",
    "error, computed steps",
)
ABOUT = """\
Seconds and milliseconds are medians over {generations} generations of {steps} steps. The systems \
take turns, one generation each, and never run at the same time.

- *x limit*: relative to the physical limit: {computed} x the uncached compiled step + {reused} x \
the compiled time of the work that a reused step cannot skip.
- *compile*: the extra time of the first generation, with empty compiler caches.
- *graphs*, *breaks*, *recompiles*: counted by Dynamo.
- *cache*: the memory still used after a generation.
- *peak*: the memory allocated on the GPU, including the weights.
- *error*: the largest relative difference to the uncached output on a computed step.

FirstBlockCache chooses its steps itself. Its threshold is set so that it computes the same number \
of steps, or nearly.
"""


def report(data: dict[str, Any], command: str) -> str:
    """The section of a device: the versions, and a table for each model."""
    settings, machine = data["settings"], data["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["peers"].items())
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    lines = [
        f"## {machine['device']}{_of_steps(settings)}",
        "",
        f"{settings['dtype']}{threads}; Python {machine['python']}, PyTorch {machine['torch']}, "
        f"{versions}; compiled with {settings['inner']}. Command: `{command}`.",
        "",
        ABOUT.format(reused=settings["steps"] - settings["computed"], **settings),
    ]
    for name, entry in data["models"].items():
        lines += [f"### {entry['title']}", "", *model_table(entry["rows"], settings), ""]
        lines += [f"![{name}](img/bench_{run_name(settings)}_{name}.png)", ""]
    lines += _compile_times(data.get("compile_times", {}))
    return "\n".join(lines)


def _of_steps(settings: dict[str, Any]) -> str:
    return "" if settings["steps"] == STEPS else f", {settings['steps']} steps"


def model_table(rows: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The lines of a model's table, and its conclusions."""
    measured = figures(rows, settings)
    head = tuple(title.replace("50", str(settings["steps"])) for title in HEAD)
    keep = [i for i in range(len(head)) if i != 12 or any(row.peak_bytes for row in measured)]
    table = [head, ["---"] + ["---:"] * (len(head) - 1), *map(_cells, measured)]
    lines = ["| " + " | ".join(cells[i] for i in keep) + " |" for cells in table]
    return [*lines, "", *_conclusions(physical_limit(rows, settings), measured)]


def _cells(row: Figures) -> Sequence[str]:
    title = f"**{row.title}**" if row.kind == "ours" else row.title
    if row.failed is not None:
        return (title, row.failed.replace("|", "/"), *[""] * (len(HEAD) - 2))
    return (
        title,
        _number(row.seconds, ".3f"),
        _number(row.of_limit, ".3f"),
        _number(row.computed_ms, ".2f"),
        _number(row.reused_ms, ".3f"),
        _number(row.reused_share, ".2%"),
        _number(row.computed, "d"),
        _number(row.compile_seconds, ".1f"),
        _number(row.graphs, "d"),
        _number(row.breaks, "d"),
        _number(row.recompiles, "d"),
        _number(None if row.cache_bytes is None else row.cache_bytes / 2**20, ".2f"),
        _number(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".0f"),
        _number(row.error_computed, ".1e"),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _conclusions(limit: float | None, measured: list[Figures]) -> list[str]:
    uncached = best(measured, "uncached")
    lines = []
    if limit is not None and uncached is not None and uncached.seconds is not None:
        lines.append(
            f"- Physical limit: {limit:.3f} s. Uncached: {uncached.seconds:.3f} s "
            f"({uncached.title})."
        )
    ours, computed = best(measured, "ours"), None
    if ours is not None and ours.seconds is not None:
        computed = ours.computed
        lines.append(
            f"- Fastest with this library: {ours.seconds:.3f} s ({ours.title}), "
            f"{_number(ours.of_limit, '.3f')} x the limit."
        )
    peer = best(measured, "peer", computed)
    if ours and peer and ours.seconds and peer.seconds:
        lines.append(
            f"- Fastest other system with as many computed steps: {peer.seconds:.3f} s "
            f"({peer.title}), {peer.seconds / ours.seconds:.2f} x this library's time."
        )
    lines += _reused(measured)
    return lines


def _reused(measured: list[Figures]) -> list[str]:
    """The shortest reused step of each kind of system."""

    def shortest(kind: str) -> Figures | None:
        timed = [r for r in measured if r.kind == kind and r.reused_ms is not None]
        return min(timed, key=lambda r: r.reused_ms or 0, default=None)

    ours, peer, limit = shortest("ours"), shortest("peer"), shortest("limit")
    said = [
        f"{row.reused_ms:.3f} ms ({row.title})"
        for row in (ours, peer, limit)
        if row is not None and row.reused_ms is not None
    ]
    return [f"- Shortest reused step: {'; '.join(said)}."] if said else []


def _compile_times(times: dict[str, list[float]]) -> list[str]:
    if not times:
        return []
    base = median(times["compiled"]) if times.get("compiled") else None
    lines = ["### Compile time, 24 blocks", "", "| system | s, median | x uncached |"]
    lines.append("|---|---:|---:|")
    for name, seconds in times.items():
        ratio = median(seconds) / base if base else None
        lines.append(f"| {ROWS[name].title} | {median(seconds):.1f} | {_number(ratio, '.2f')} |")
    return [*lines, ""]


def write(file: Path, sections: Sequence[str]) -> None:
    """Put the sections between the marks of `file`, and leave the rest of it as it is."""
    text = file.read_text() if file.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(before + BEGIN + "\n\n" + "\n\n".join(sections) + "\n" + END + after)
