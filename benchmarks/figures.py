"""From what was measured: the figures of each row, and those that compare rows."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.systems import ROWS

#: a run of another number of steps has it in its name
STEPS = 50


def run_name(settings: dict[str, Any]) -> str:
    """What the files of a run are called by: its device, and its steps where they are others."""
    usual = settings["steps"] == STEPS or settings["size"] == "tiny"
    return settings["device"] if usual else f"{settings['device']}-{settings['steps']}"


@dataclass(frozen=True)
class Figures:
    """A row of the table: medians over the generations. Times in seconds (`*_ms`: milliseconds).

    `failed`: why there are no figures. `of_limit`: seconds over the physical limit.
    """

    system: str
    title: str
    kind: str
    failed: str | None = None
    seconds: float | None = None
    computed_ms: float | None = None
    reused_ms: float | None = None
    computed: int | None = None
    compile_seconds: float | None = None
    graphs: int | None = None
    breaks: int | None = None
    recompiles: int | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    error_computed: float | None = None
    of_limit: float | None = None

    @property
    def reused_share(self) -> float | None:
        """The reused step over the computed one."""
        if self.reused_ms is None or self.computed_ms is None:
            return None
        return self.reused_ms / self.computed_ms


def figures(rows: dict[str, Any], settings: dict[str, Any]) -> list[Figures]:
    """The rows of a model, in the order of `ROWS`."""
    limit = physical_limit(rows, settings)
    return [_figures(name, rows[name], limit) for name in ROWS if name in rows]


def _figures(name: str, row: dict[str, Any], limit: float | None) -> Figures:
    about = {"system": name, "title": ROWS[name].title, "kind": ROWS[name].kind}
    if "failed" in row:
        return Figures(**about, failed=row["failed"])
    seconds = over_generations(row, "seconds")
    compiles = ROWS[name].compiles and seconds is not None
    return Figures(
        **about,
        seconds=seconds,
        computed_ms=over_generations(row, "computed_ms"),
        reused_ms=over_generations(row, "reused_ms"),
        computed=row["generations"][-1]["computed"] if row["generations"] else None,
        compile_seconds=max(0.0, row["first_seconds"] - seconds) if compiles else None,
        graphs=row.get("graphs"),
        breaks=row.get("breaks"),
        recompiles=row.get("recompiles"),
        cache_bytes=row.get("cache_bytes"),
        peak_bytes=max((g.get("peak_bytes", 0) for g in row["generations"]), default=0) or None,
        error_computed=row.get("error_computed"),
        of_limit=seconds / limit if ROWS[name].caches and limit and seconds else None,
    )


def physical_limit(rows: dict[str, Any], settings: dict[str, Any]) -> float | None:
    """Seconds: the compiled model on computed steps, only what must still run on the others."""
    full = over_generations(rows.get("compiled", {}), "computed_ms")
    rest = over_generations(rows.get("limit", {}), "reused_ms")
    if full is None or rest is None:
        return None
    computed = settings["computed"]
    return (computed * full + (settings["steps"] - computed) * rest) / 1000


def over_generations(row: dict[str, Any], name: str) -> float | None:
    """The median of what each generation gave."""
    values = [g[name] for g in row.get("generations", ()) if g[name] is not None]
    return median(values) if values else None


def best(rows: list[Figures], kind: str, computed: int | None = None) -> Figures | None:
    """The fastest row of a kind, of those that computed at least so many steps."""
    timed = [
        row
        for row in rows
        if row.kind == kind and row.seconds is not None and (row.computed or 0) >= (computed or 0)
    ]
    return min(timed, key=lambda row: row.seconds or 0, default=None)
