"""Copies of nodes in another graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.node_meta import BlockId, NodeMeta, block_of, is_block, mark, meta_of


def negated() -> fx.Graph:
    """`-(x + y)`."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(torch.neg, (graph.call_function(torch.add, (x, y)),)))
    return graph


def run(graph: fx.Graph, *inputs: Any) -> Any:
    return fx.GraphModule({}, graph)(*inputs)


def test_copies_read_what_stands_for_their_inputs() -> None:
    source, graph = negated(), fx.Graph()
    new: dict[fx.Node, Any] = dict.fromkeys(source.find_nodes(op="placeholder"), 0)
    new.update((n, graph.placeholder(f"new_{n.name}")) for n in new)
    copy_nodes(graph, body(source), new)
    graph.output(new[body(source)[-1]])
    assert [n.name for n in graph.nodes] == ["new_x", "new_y", "add", "neg", "output"]
    assert run(graph, 1.0, torch.tensor(2.0)) == -3


def test_what_is_there_already_is_not_copied_again() -> None:
    source, graph = negated(), fx.Graph()
    add = body(source)[0]
    new = {add: graph.placeholder("total")}
    copy_nodes(graph, body(source), new)
    assert [n.name for n in graph.nodes] == ["total", "neg"]


def test_another_node_may_stand_for_one() -> None:
    source, graph = negated(), fx.Graph()
    new: dict[fx.Node, Any] = {}

    def product(node: fx.Node) -> Any:
        if node.target is not torch.add:
            return None
        return graph.call_function(operator.mul, tuple(new[n] for n in node.args))  # type: ignore[index]

    copy_nodes(graph, source.nodes, new, product)
    assert run(graph, 3.0, torch.tensor(2.0)) == -6


def test_a_copy_has_notes_of_its_own() -> None:
    source, graph = negated(), fx.Graph()
    add = body(source)[0]
    mark(add, origin="before")
    new: dict[fx.Node, Any] = {}
    copy_nodes(graph, source.nodes, new)
    mark(new[add], origin="after")
    assert (meta_of(add).origin, meta_of(new[add]).origin) == ("before", "after")


def test_of_what_makes_a_value_nothing_is_noted_on_an_input_for_it() -> None:
    source, graph = negated(), fx.Graph()
    add = body(source)[0]
    mark(add, block=BlockId("blocks", 0), signal=True, output=0, path=(), keys=(0, 1))
    placeholder = add_input(graph, add)
    assert placeholder.name == "add"
    assert meta_of(placeholder) == NodeMeta(output=0, path=())
    assert is_block(add)
    assert not is_block(placeholder)
    with pytest.raises(VerifyError, match="add is no call of a block"):
        block_of(placeholder)


def test_an_index_among_results_comes_with_a_path() -> None:
    (add, _) = body(negated())
    with pytest.raises(VerifyError, match="both an index and a path"):
        mark(add, output=0)
    assert meta_of(add) == NodeMeta()
