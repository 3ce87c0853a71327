"""Pass 5: drop what nothing reads any more."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dit_cache_fx.cached_run import is_cached_run
from dit_cache_fx.program import Program, attributes_of, graph_module, is_kept
from dit_cache_fx.strategies import Strategy


def dead_code(program: Program, strategy: Strategy) -> None:
    """Drop nodes without readers; blocks that are never cached stay.

    Before:

        %a = aten.add(%x, 1)
        %run_0 = cache_or_compute(...)
        return [%run_0]

    After, the same without `%a`. An output that is a held tensor (or a view of one) becomes a
    copy: the caller may change what it gets.
    """
    graph = program.graph
    graph.eliminate_dead_code(is_kept)
    _own_outputs(graph)
    attributes = attributes_of(program.gm, graph)
    program.gm = graph_module(program.model, attributes, graph, "Cached")


def _own_outputs(graph: fx.Graph) -> None:
    output = graph.output_node()
    for node in set(output.all_input_nodes):
        if _shares_held(node):
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta.update(node.meta)
            output.replace_input_with(node, copy)


def _shares_held(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and (is_cached_run(source) or _shares_held(source))
    views = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return views and any(_shares_held(n) for n in node.all_input_nodes)
