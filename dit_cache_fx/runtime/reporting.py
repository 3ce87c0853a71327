"""Makes a `CacheReport` of what a host and its graphs hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.host import Host
from dit_cache_fx.runtime.report import CacheReport, CaptureReport
from dit_cache_fx.strategies import Strategy


def report(host: Host, entries: Sequence[Lowered], enabled: bool) -> CacheReport:
    """The state right now. `entries`: the host's graphs."""
    blocks = entries[-1].program.block_lists if entries else {}
    branches = list(_branches(host, entries))
    computed, reused = _steps(host)
    return CacheReport(
        strategy=host.strategy.name or type(host.strategy).__name__,
        enabled=enabled,
        blocks=dict(blocks),
        cached_blocks=_cached(entries[-1]) if entries else {},
        captures=tuple(_capture(entry) for entry in entries),
        bytes_held=sum(_held(branch) for _, branch in branches),
        bytes_per_block=sum(
            _per_block(entry) * host.strategy.slots() for entry, b in branches if b.held
        ),
        bytes_rule=sum(_remembered(branch) for _, branch in branches),
        steps_computed=computed,
        steps_reused=reused,
        calls_computed=host.calls["computed"],
        calls_reused=host.calls["reused"],
        threshold=host.strategy.threshold,
        timeline=tuple(host.records()),
        schedule=schedule_of(host.strategy),
        num_steps=host.tracker.num_steps,
    )


def schedule_of(strategy: Strategy) -> str:
    """The option that says which steps compute, where it is no list of them."""
    if strategy.compute_ratio is not None:
        return f"compute_ratio {strategy.compute_ratio:.3g}"
    return "" if strategy.schedule is None else str(strategy.schedule)


def _branches(host: Host, entries: Sequence[Lowered]) -> Iterator[tuple[Lowered, Branch]]:
    known = {e.serial: e for e in entries}
    for key, session in host.tracker.sessions.items():
        for branch in session.branches:
            if key.serial in known:
                yield known[key.serial], branch


def _held(branch: Branch) -> int:
    return sum(held.nbytes for held in branch.held)


def _remembered(branch: Branch) -> int:
    return sum(t.numel() * t.element_size() for t in branch.memory or ())


def _per_block(entry: Lowered) -> int:
    """Bytes of all results of the cached blocks, as a helper that wraps each block holds them."""
    cached = {f"{b.list_name}.{b.index}" for r in entry.program.regions for b in r.blocks}
    return sum(entry.block_bytes[name] for name in cached)


def _steps(host: Host) -> tuple[int, int]:
    """Steps of the last generation that a branch computed, and that none did."""
    computed = {r.step for r in host.timeline if r.action == "computed"}
    return len(computed), len({r.step for r in host.timeline} - computed)


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
