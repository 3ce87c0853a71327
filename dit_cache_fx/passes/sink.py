"""Pass 4: what only the compute side of a run needs moves into it."""

from __future__ import annotations

from torch import fx

from dit_cache_fx.passes.guard_runs import cache_or_compute
from dit_cache_fx.program import (
    BLOCK,
    Program,
    ancestors,
    attributes_of,
    graph_module,
)
from dit_cache_fx.strategies import Strategy


def sink(program: Program, strategy: Strategy) -> None:
    """Move the prologue (embedders, text refiners, rotary tables, masks) into the compute side.

    Before:

        %h = call_module[model.x_embedder](%x)
        %c = call_module[model.refiner](%text)
        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%h, %c])

    After:

        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%x, %text])

    with both calls at the head of `run_0_compute`. What two runs need is copied into both.
    """
    attributes = attributes_of(program.gm, program.graph)
    moved = _sinkable(program.graph)
    for run in _runs(program.graph):
        _absorb(program, run, moved, attributes)
    program.graph.lint()
    program.graph.eliminate_dead_code(_kept)
    program.gm = graph_module(program.model, attributes, program.graph, "Sunk")


def _runs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is cache_or_compute]


def _kept(node: fx.Node) -> bool:
    return BLOCK in node.meta or node.op in ("placeholder", "output")


def _sinkable(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are read by nothing but the compute sides, directly or through each other."""
    moved: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _kept(node) or node.target is cache_or_compute or not node.users:
            continue
        if all(user in moved or _only_operand(node, user) for user in node.users):
            moved.add(node)
    return moved


def _only_operand(node: fx.Node, run: fx.Node) -> bool:
    return run.target is cache_or_compute and node in run.args[4] and node not in run.args[3]


def _absorb(
    program: Program, run: fx.Node, moved: set[fx.Node], attributes: dict[str, object]
) -> None:
    _, target, _, starts, operands = run.args
    sunk = ancestors(operands, stop=[n for n in program.graph.nodes if n not in moved]) & moved
    if not sunk:
        return
    read = {n for node in sunk for n in node.all_input_nodes} | set(operands)
    outside = [n for n in program.graph.nodes if n in read and n not in sunk]
    old: fx.GraphModule = attributes[str(target.target)]
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    places = [n for n in old.graph.nodes if n.op == "placeholder"]
    head = len(places) - len(operands)
    mapped = {p: graph.node_copy(p) for p in places[:head]}
    new.update(zip(starts, list(mapped.values())[head - len(starts) :], strict=True))
    for node in outside:
        if node not in new:
            new[node] = graph.placeholder(node.name)
            new[node].meta.update(node.meta)
    for node in program.graph.nodes:
        if node in sunk:
            new[node] = graph.node_copy(node, new.__getitem__)
    mapped.update(zip(places[head:], [new[n] for n in operands], strict=True))
    graph.output(graph.graph_copy(old.graph, mapped))
    own = {**attributes_of(old, graph), **attributes_of(program.gm, graph)}
    attributes[str(target.target)] = graph_module(program.model, own, graph, type(old).__name__)
    run.update_arg(4, [n for n in outside if n not in starts])
