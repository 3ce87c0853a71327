"""What `cache_report()` returns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """One call in the last generation. `action`: "computed", "reused" or "predicted".

    `why`: why it computed. `graph`: the number of the captured graph. `context`: the cache context.
    A branch is one of a graph and context. `measured`: what the strategy's own rule had measured
    when it decided.
    """

    step: int
    timestep: float
    branch: int
    action: str
    why: str = ""
    graph: int = 0
    context: str | None = None
    measured: float | None = None

    def __str__(self) -> str:
        where = f"branch {self.branch}" if self.context is None else f"{self.context!r}"
        text = f"step {self.step} (timestep {self.timestep:g}, {where}): {self.action}"
        notes = [self.why] if self.why else []
        notes += [] if self.measured is None else [f"measured {self.measured:.4g}"]
        return f"{text} ({', '.join(notes)})" if notes else text


@dataclass(frozen=True)
class CaptureReport:
    """One captured graph.

    `runs`: the blocks cached together. `values`: shape and dtype of what leaves each run.
    `nodes`: nodes of the graph as captured; `nodes_reused`: those that a reused step executes.
    """

    inputs: str
    runs: tuple[tuple[str, ...], ...]
    values: tuple[str, ...]
    nodes: int
    nodes_reused: int


@dataclass(frozen=True)
class CacheReport:
    """What is cached, what it holds, and what the last generation did.

    `bytes_held`: of the cache right now, all branches and signatures. `bytes_per_block`: what
    holding every cached block's result would take for the same calls. `bytes_rule`: what the
    strategy's own rule remembers. `steps_computed`, `steps_reused`: steps of the last generation.
    `calls_computed`, `calls_reused`: calls since `apply` or `reset_states`. `threshold`: what the
    strategy's own rule compares a step's `measured` with. `schedule`: the
    option, where it is no list of steps. `num_steps`: how many it was told that there are.
    """

    strategy: str
    enabled: bool
    blocks: dict[str, int]
    cached_blocks: dict[str, tuple[int, ...]]
    captures: tuple[CaptureReport, ...]
    bytes_held: int
    bytes_per_block: int
    bytes_rule: int
    steps_computed: int
    steps_reused: int
    calls_computed: int
    calls_reused: int
    threshold: float | None = None
    timeline: tuple[StepRecord, ...] = field(repr=False, default=())
    schedule: str = ""
    num_steps: int | None = None

    def __str__(self) -> str:
        lists = ", ".join(
            f"{name}: {len(self.cached_blocks.get(name, ()))} of {n} blocks cached"
            for name, n in self.blocks.items()
        )
        name = self.strategy if self.enabled else f"{self.strategy} (disabled)"
        lines = [
            f"{name}: {lists or 'nothing captured'}",
            f"held: {size(self.bytes_held)} (one result per block would take "
            f"{size(self.bytes_per_block)})",
            f"last generation: {self.steps_computed} steps computed, {self.steps_reused} not",
        ]
        if self.schedule:
            known = "" if self.num_steps is None else f", for {self.num_steps} steps"
            lines.append(f"schedule: {self.schedule}{known}")
        for capture in self.captures:
            lines.append(f"graph for {capture.inputs}:")
            lines.append(
                f"  {capture.nodes} nodes captured, {capture.nodes_reused} on a reused step"
            )
            for run, value in zip(capture.runs, capture.values, strict=True):
                lines.append(f"  {run[0]} .. {run[-1]} ({len(run)} blocks) holds {value}")
        return "\n".join(lines)


def size(nbytes: int) -> str:
    """Bytes as text: `96 KiB`."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
