"""The parts of a graph, and copies of its nodes in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from dit_cache_fx.ir.node_meta import mark


def copy_nodes(
    graph: fx.Graph,
    nodes: Iterable[fx.Node],
    new: dict[fx.Node, Any],
    instead: Callable[[fx.Node], Any] | None = None,
) -> None:
    """Copy `nodes`, in their order, to the end of `graph`.

    `new`: node -> its counterpart in `graph`. The copies are added to it; nodes that it contains
    are not copied again. If `instead(node)` is not None, it replaces the node: another node, or a
    list or dict of nodes (then `instead` also answers for the nodes that take its items).
    """
    for node in nodes:
        if node not in new:
            other = None if instead is None else instead(node)
            new[node] = graph.node_copy(node, new.__getitem__) if other is None else other


def body(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes between the placeholders and the output."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def results_of(graph: fx.Graph) -> list[Any]:
    """Return the outputs of a graph whose result is a list of nodes (or constants)."""
    results: Any = graph.output_node().args[0]
    return list(results)


def add_input(graph: fx.Graph, node: fx.Node, name: str | None = None) -> fx.Node:
    """Add a placeholder to `graph` for the value of `node`, under its name or another one."""
    placeholder = graph.placeholder(name or node.name)
    placeholder.meta.update(node.meta)
    mark(placeholder, block=None, signal=False, keys=None, within=None, parts=None, part=False)
    return placeholder
