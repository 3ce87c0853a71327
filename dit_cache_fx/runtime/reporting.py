"""Makes a `CacheReport` from an engine."""

from __future__ import annotations

from collections.abc import Iterator

from dit_cache_fx.program import operations
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.engine import Engine
from dit_cache_fx.runtime.graphs import Entry
from dit_cache_fx.runtime.report import CacheReport, CaptureReport
from dit_cache_fx.strategies import Strategy


def report(engine: Engine, enabled: bool) -> CacheReport:
    """The state of `engine` right now."""
    entries = [entry for variants in engine.graphs.entries.values() for entry in variants]
    blocks = entries[-1].captured.program.block_lists if entries else {}
    branches = list(_branches(engine))
    computed, reused = _steps(engine)
    return CacheReport(
        strategy=engine.strategy.name or type(engine.strategy).__name__,
        enabled=enabled,
        blocks=dict(blocks),
        cached_blocks=_cached(entries[-1]) if entries else {},
        captures=tuple(_capture(entry) for entry in entries),
        bytes_held=sum(_held(branch) for _, branch in branches),
        bytes_per_block=sum(
            _per_block(entry) * engine.strategy.slots() for entry, b in branches if b.held
        ),
        bytes_rule=sum(_remembered(branch) for _, branch in branches),
        steps_computed=computed,
        steps_reused=reused,
        calls_computed=engine.calls["computed"],
        calls_reused=engine.calls["reused"],
        timeline=tuple(engine.timeline),
        schedule=_schedule(engine.strategy),
        num_steps=engine.tracker.num_steps,
    )


def _schedule(strategy: Strategy) -> str:
    if strategy.compute_ratio is not None:
        return f"compute_ratio {strategy.compute_ratio:.3g}"
    return "" if strategy.schedule is None else str(strategy.schedule)


def _branches(engine: Engine) -> Iterator[tuple[Entry, Branch]]:
    entries = {e.serial: e for variants in engine.graphs.entries.values() for e in variants}
    for key, session in engine.tracker.sessions.items():
        for branch in session.branches:
            if key.serial in entries:
                yield entries[key.serial], branch


def _held(branch: Branch) -> int:
    return sum(held.nbytes for held in branch.held)


def _remembered(branch: Branch) -> int:
    return sum(t.numel() * t.element_size() for t in branch.memory or ())


def _per_block(entry: Entry) -> int:
    """Bytes of all results of the cached blocks, as a helper that wraps each block holds them."""
    cached = {
        f"{b.list_name}.{b.index}"
        for region in entry.captured.program.regions
        for b in region.blocks
    }
    calls = [c for c in entry.captured.recording.calls if c.name in cached]
    return sum(spec.nbytes for call in calls for spec in call.specs)


def _steps(engine: Engine) -> tuple[int, int]:
    """Steps of the last generation that a branch computed, and that none did."""
    computed = {r.step for r in engine.timeline if r.action == "computed"}
    return len(computed), len({r.step for r in engine.timeline} - computed)


def _cached(entry: Entry) -> dict[str, tuple[int, ...]]:
    program = entry.captured.program
    blocks = {(b.list_name, b.index) for region in program.regions for b in region.blocks}
    return {
        name: tuple(sorted(index for of, index in blocks if of == name))
        for name in program.block_lists
    }


def _capture(entry: Entry) -> CaptureReport:
    program = entry.captured.program
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    return CaptureReport(
        inputs=", ".join(f"{n.name}{list(n.meta['val'].shape)}" for n in inputs),
        runs=tuple(tuple(str(b) for b in region.blocks) for region in program.regions),
        values=tuple(
            ", ".join(f"{v}{list(program.node(v).meta['val'].shape)}" for v in region.values)
            for region in program.regions
        ),
        nodes=entry.nodes,
        nodes_reused=_nodes_reused(entry),
    )


def _nodes_reused(entry: Entry) -> int:
    """Nodes that a reused step executes."""
    parts = [entry.variants.reuse, entry.variants.prefix]
    return sum(operations(part.gm.graph) for part in parts if part is not None)
