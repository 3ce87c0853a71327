"""Run the passes, in the only order that there is.

To find the pass that breaks a program, leave passes out by name: on a computed step each program
must give the model's own output, whichever pass is missing.

    run_passes(program, strategy, skip={"sink"})

`TORCH_LOGS="+dit_cache_fx"` logs the changes of each pass.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection

from torch import fx

from dit_cache_fx.errors import DitCacheError, OptionError, VerifyError
from dit_cache_fx.ir.cached_run import cached_runs
from dit_cache_fx.ir.graph_text import trace_graph
from dit_cache_fx.ir.program import Program
from dit_cache_fx.ir.verify import verify
from dit_cache_fx.passes.dead_code import dead_code
from dit_cache_fx.passes.find_values import find_values
from dit_cache_fx.passes.fold_constants import fold_constants
from dit_cache_fx.passes.forward_slices import forward_slices
from dit_cache_fx.passes.guard_runs import guard_runs
from dit_cache_fx.passes.select_runs import select_runs
from dit_cache_fx.passes.sink import sink
from dit_cache_fx.strategies import Strategy

Pass = Callable[[Program, Strategy], None]
Observer = Callable[[str, Program], None]

PASSES: tuple[Pass, ...] = (
    forward_slices,
    fold_constants,
    select_runs,
    find_values,
    guard_runs,
    sink,
    dead_code,
)

log = logging.getLogger(__name__)


def run_passes(
    program: Program,
    strategy: Strategy,
    observe: Observer | None = None,
    skip: Collection[str] = (),
) -> None:
    """Run every pass, and the verifier and `observe` after each.

    `skip`: the names of passes to leave out, to find the faulty one.

    Raises `VerifyError` with the name of the pass that failed or left a broken program.
    """
    names = [apply_pass.__name__ for apply_pass in PASSES]
    if not set(skip) <= set(names):
        raise OptionError("skip", sorted(skip), f"the names of passes: {names}")
    trace_graph("captured", program.gm)
    for apply_pass in PASSES:
        if apply_pass.__name__ not in skip:
            _run(apply_pass, program, strategy)
            if observe is not None:
                observe(apply_pass.__name__, program)


def _run(apply_pass: Pass, program: Program, strategy: Strategy) -> None:
    name = apply_pass.__name__
    began = time.perf_counter()
    before = _operations(program) if log.isEnabledFor(logging.DEBUG) else Counter()
    try:
        apply_pass(program, strategy)
        verify(program)
    except VerifyError as error:
        raise VerifyError(f"in pass {name}: {error}") from error
    except DitCacheError:
        raise
    except Exception as error:
        raise VerifyError(f"in pass {name}: {type(error).__name__}: {error}") from error
    if log.isEnabledFor(logging.DEBUG):
        milliseconds = 1e3 * (time.perf_counter() - began)
        log.debug("%s: %s, %.1f ms", name, _change(before, _operations(program)), milliseconds)
    trace_graph(f"after_{name}", program.gm)


def _operations(program: Program) -> Counter[str]:
    """Count each operation in the graph and in the two sides of its runs."""
    runs = cached_runs(program.graph)
    sides = [getattr(program.gm, name) for run in runs for name in (run.compute, run.reuse)]
    nodes = [n for gm in (program.gm, *sides) for n in gm.graph.nodes]
    return Counter(_operation(n) for n in nodes if n.op.startswith("call_"))


def _operation(node: fx.Node) -> str:
    if node.op == "call_module":
        return "call_module"
    return str(getattr(node.target, "__name__", node.target))


def _change(before: Counter[str], after: Counter[str]) -> str:
    """Describe a change: `40 -> 31 operations (add.Tensor -9)`."""
    names = sorted({*before, *after})
    parts = [f"{n} {after[n] - before[n]:+d}" for n in names if after[n] != before[n]]
    changed = ", ".join(parts) or "none changed"
    return f"{before.total()} -> {after.total()} operations ({changed})"
