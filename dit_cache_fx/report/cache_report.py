"""The result of `cache_report()`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.step_record import StepRecord
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.strategies.schedule import ListedSteps


@dataclass(frozen=True)
class CaptureReport:
    """One captured graph.

    Attributes:
        inputs (`str`):
            The inputs of the calls that it answers: names and shapes.
        runs (`tuple[tuple[str, ...], ...]`):
            The names of the blocks that are cached together, for each run.
        values (`tuple[str, ...]`):
            The names and shapes of the values that leave each run.
        nodes (`int`):
            The number of nodes in the graph as captured.
        nodes_reused (`int`):
            The number of nodes that a reused step executes.
    """

    inputs: str
    runs: tuple[tuple[str, ...], ...]
    values: tuple[str, ...]
    nodes: int
    nodes_reused: int


@dataclass(frozen=True)
class CacheReport:
    """The cached blocks, the held bytes, and the steps of the last generation. Print it.

    Attributes:
        strategy (`str`):
            The name of the strategy.
        enabled (`bool`):
            Whether the cache is enabled.
        blocks (`dict[str, int]`):
            The number of blocks in each block list.
        cached_blocks (`dict[str, tuple[int, ...]]`):
            The indices of the cached blocks in each block list.
        captures (`tuple[CaptureReport, ...]`):
            The captured graphs.
        bytes_held (`int`):
            The bytes that the cache holds right now, for all branches and signatures.
        bytes_per_block (`int`):
            The bytes that the results of every cached block would take for the same calls.
        bytes_rule (`int`):
            The bytes of the state of the strategy's own rule.
        steps_computed (`int`):
            The computed steps of the last generation.
        steps_reused (`int`):
            The other steps of the last generation.
        calls_computed (`int`):
            The computed calls since `apply` or `reset_states`.
        calls_reused (`int`):
            The other calls since then.
        threshold (`float | None`):
            The threshold of the strategy's own rule, for the `measured` of each step.
        timeline (`tuple[StepRecord, ...]`):
            The calls of the last generation, in order.
        schedule (`str`):
            The option that selects the computed steps; empty if it is a list of them.
        num_steps (`int | None`):
            The number of steps in a generation, as far as it is known.

    Example:
        >>> report = cached.cache_report()
        >>> report.steps_computed, report.steps_reused
        (4, 8)
        >>> print(report)
        taylorcache...
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
    """Format a number of bytes: `96 KiB`."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def report(call_log: CallLog, entries: Sequence[Lowered], enabled: bool) -> CacheReport:
    """Return the current state. `entries`: the graphs that answer its calls."""
    blocks = entries[-1].program.block_lists if entries else {}
    branches = list(_branches(call_log, entries))
    records = call_log.records()
    computed, reused = _steps(records)
    return CacheReport(
        strategy=call_log.strategy.name or type(call_log.strategy).__name__,
        enabled=enabled,
        blocks=dict(blocks),
        cached_blocks=_cached(entries[-1]) if entries else {},
        captures=tuple(_capture(entry) for entry in entries),
        bytes_held=sum(_bytes_cached(branch) for _, branch in branches),
        bytes_per_block=sum(
            _per_block(entry) * call_log.strategy.slots() for entry, b in branches if b.cached
        ),
        bytes_rule=sum(_remembered(branch) for _, branch in branches),
        steps_computed=computed,
        steps_reused=reused,
        calls_computed=call_log.calls["computed"],
        calls_reused=call_log.calls["reused"],
        threshold=call_log.strategy.threshold,
        timeline=tuple(records),
        schedule=schedule_of(call_log.strategy),
        num_steps=call_log.num_steps,
    )


def schedule_of(strategy: Strategy) -> str:
    """Return the option that places the computed steps; empty if it is a list of them."""
    if strategy.compute_ratio is not None:
        return f"compute_ratio {strategy.compute_ratio:.3g}"
    if strategy.computed_steps is not None:
        return f"computed_steps {strategy.computed_steps}"
    if strategy.schedule is not None:
        return str(strategy.schedule)
    plan = strategy.plan
    return "" if plan is None or isinstance(plan, ListedSteps) else str(plan)


def _branches(call_log: CallLog, entries: Sequence[Lowered]) -> Iterator[tuple[Lowered, Branch]]:
    known = {e.serial: e for e in entries}
    for session in call_log.tracker.sessions():
        for branch in session.branches:
            if branch.serial in known:
                yield known[branch.serial], branch


def _bytes_cached(branch: Branch) -> int:
    return sum(tensor.nbytes for tensor in branch.cached)


def _remembered(branch: Branch) -> int:
    return sum(t.numel() * t.element_size() for t in branch.rule_state or ())


def _per_block(entry: Lowered) -> int:
    """Return the bytes of all results of the cached blocks: the cost of caching each block."""
    cached = {f"{b.list_name}.{b.index}" for r in entry.program.regions for b in r.blocks}
    return sum(entry.block_bytes[name] for name in cached)


def _steps(records: Sequence[StepRecord]) -> tuple[int, int]:
    """Count the last generation's steps that a branch computed, and those that none did."""
    computed = {r.step for r in records if r.action == "computed"}
    return len(computed), len({r.step for r in records} - computed)


def _cached(entry: Lowered) -> dict[str, tuple[int, ...]]:
    program = entry.program
    blocks = {(b.list_name, b.index) for region in program.regions for b in region.blocks}
    return {
        name: tuple(sorted(index for of, index in blocks if of == name))
        for name in program.block_lists
    }


def _capture(entry: Lowered) -> CaptureReport:
    program = entry.program
    return CaptureReport(
        inputs=entry.takes,
        runs=tuple(tuple(str(b) for b in region.blocks) for region in program.regions),
        values=tuple(
            ", ".join(f"{v}{list(program.node(v).meta['val'].shape)}" for v in region.values)
            for region in program.regions
        ),
        nodes=entry.nodes,
        nodes_reused=entry.nodes_reused,
    )
