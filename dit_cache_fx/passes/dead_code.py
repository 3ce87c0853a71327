"""Pass 6: remove nodes that have no readers."""

from __future__ import annotations

from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.nodes import is_kept
from dit_cache_fx.ir.program import Program
from dit_cache_fx.strategies import Strategy


def dead_code(program: Program, strategy: Strategy) -> None:
    """Remove nodes without readers; keep blocks that are never cached.

    Before:

        %a = aten.add(%x, 1)
        %run_0 = cache_or_compute(...)
        return [%run_0]

    After, the same without `%a`.
    """
    graph = program.graph
    graph.eliminate_dead_code(is_kept)
    attributes = attributes_of(program.gm, graph)
    program.gm = graph_module(program.model, attributes, graph, "Cached")
