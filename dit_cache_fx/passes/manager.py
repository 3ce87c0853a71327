"""The passes, in the one order in which they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dit_cache_fx.ir.graph_text import trace_graph
from dit_cache_fx.ir.program import Program
from dit_cache_fx.ir.verify import verify
from dit_cache_fx.passes.dead_code import dead_code
from dit_cache_fx.passes.find_values import find_values
from dit_cache_fx.passes.forward_slices import forward_slices
from dit_cache_fx.passes.guard_runs import guard_runs
from dit_cache_fx.passes.select_runs import select_runs
from dit_cache_fx.passes.sink import sink
from dit_cache_fx.strategies import Strategy

Pass = Callable[[Program, Strategy], None]
Observer = Callable[[str, Program], None]

PASSES: tuple[Pass, ...] = (
    forward_slices,
    select_runs,
    find_values,
    guard_runs,
    sink,
    dead_code,
)

log = logging.getLogger(__name__)


def run_passes(program: Program, strategy: Strategy, observe: Observer | None = None) -> None:
    """Run every pass, and the verifier after each. `observe` sees the program after each."""
    trace_graph("captured", program.gm)
    for apply_pass in PASSES:
        began, before = time.perf_counter(), len(program.graph.nodes)
        apply_pass(program, strategy)
        verify(program)
        log.debug(
            "%s: %d -> %d nodes, %.1f ms",
            apply_pass.__name__,
            before,
            len(program.graph.nodes),
            1e3 * (time.perf_counter() - began),
        )
        trace_graph(f"after_{apply_pass.__name__}", program.gm)
        if observe is not None:
            observe(apply_pass.__name__, program)
