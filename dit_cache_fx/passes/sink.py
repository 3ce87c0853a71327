"""Pass 5: move nodes that only the compute side of a run reads into that side."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dit_cache_fx.ir.cached_run import CachedRun, cached_runs, is_cached_run
from dit_cache_fx.ir.copying import add_input, copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.node_meta import is_block, mark
from dit_cache_fx.ir.nodes import ancestors, is_kept
from dit_cache_fx.ir.program import Program
from dit_cache_fx.strategies import Strategy


def sink(program: Program, strategy: Strategy) -> None:
    """Move the prologue (embedders, text refiners, rotary tables, masks) into the compute side.

    Before:

        %h = call_module[model.x_embedder](%x)
        %c = call_module[model.refiner](%text)
        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%h, %c])

    After:

        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%x, %text])

    with both calls at the head of `run_0_compute`. Nodes that two runs need are copied into both.
    """
    attributes = attributes_of(program.gm, program.graph)
    moved = _sinkable(program.graph)
    for run in cached_runs(program.graph):
        _absorb(program, run, moved, attributes)
    program.graph.eliminate_dead_code(is_kept)
    program.gm = graph_module(program.model, attributes, program.graph, "Sunk")


def _sinkable(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that only compute sides read, directly or through each other."""
    moved: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_kept(node) or is_cached_run(node) or not node.users or _is_result(node):
            continue
        if all(user in moved or _only_operand(node, user) for user in node.users):
            moved.add(node)
    return moved


def _is_result(node: fx.Node) -> bool:
    """Return whether the node takes a part of a block's or a run's result: it stays with that."""
    if node.target is not operator.getitem:
        return False
    container = _container(node)
    return is_block(container) or is_cached_run(container)


def _container(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _only_operand(node: fx.Node, user: fx.Node) -> bool:
    return (
        is_cached_run(user)
        and node in (run := CachedRun.of(user)).operands
        and (node not in run.run_inputs)
    )


def _absorb(
    program: Program, run: CachedRun, moved: set[fx.Node], attributes: dict[str, Any]
) -> None:
    """Put the moved nodes at the head of the run's compute side; their inputs become operands."""
    nodes = list(program.graph.nodes)
    sunk = ancestors(run.operands, stop=[n for n in nodes if n not in moved]) & moved
    if not sunk:
        return
    read = {n for node in sunk for n in node.all_input_nodes} | set(run.operands)
    outside = [n for n in nodes if n in read and n not in sunk and n not in run.run_inputs]
    old: fx.GraphModule = attributes[run.compute]
    places = old.graph.find_nodes(op="placeholder")
    head = places[: len(places) - len(run.operands)]
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    copy_nodes(graph, head, mapped)
    inputs = head[len(head) - len(run.run_inputs) :]
    new = {node: mapped[place] for node, place in zip(run.run_inputs, inputs, strict=True)}
    new.update((node, add_input(graph, node)) for node in outside)
    copy_nodes(graph, [n for n in nodes if n in sunk], new)
    for node in sunk:
        mark(new[node], origin=node.name)
    mapped.update(zip(places[len(head) :], (new[n] for n in run.operands), strict=True))
    graph.output(graph.graph_copy(old.graph, mapped))
    own = {**attributes_of(old, graph), **attributes_of(program.gm, graph)}
    attributes[run.compute] = graph_module(program.model, own, graph, type(old).__name__)
    run.node.update_arg(4, outside)
