"""Split off the parts that a compiler cannot hold in one graph: data-dependent sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, inline
from dit_cache_fx.ir.node_meta import is_block
from dit_cache_fx.ir.nodes import ancestors, descendants, items_of, spec_of, tensor_spec
from dit_cache_fx.lowering.masks import depends_on_data, masks_apart
from dit_cache_fx.lowering.part import Part
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Preamble:
    """The part of a graph that the host runs before the rest of it.

    `part` gives the inputs that `rest` reads besides the graph's own operands. `given`: name ->
    spec of each (the sizes are those of the capture).
    """

    part: Part
    given: dict[str, TensorSpec]
    rest: Part


def split_preamble(part: Part, held: Collection[str], prefix: str = "") -> Preamble | None:
    """Split masked selections off the graph of a step or of a rule; None if there are none.

    `held`: the names of the cached tensors. What depends on them, or on a block, stays in the
    graph. `prefix`: of the names of the new inputs.

    Before:

        %valid = aten.index.Tensor(%text, [%mask])
        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %b0 = call_module[model.blocks.0](%x, %padded)
        return (%b0, %b0)

    After, `part` returns `(%padded,)`, and `rest`, with a new operand `padded`:

        %b0 = call_module[model.blocks.0](%x, %padded)
        return (%b0, %b0)
    """
    if not any(map(depends_on_data, part.gm.graph.nodes)):
        return None
    gm = masks_apart(part.gm, _behind(part.gm, held))
    nodes, behind = list(gm.graph.nodes), _behind(gm, held)
    selecting = [n for n in nodes if depends_on_data(n) and n not in behind]
    if not selecting:
        return None
    needed = _with_items(ancestors(descendants(selecting) - behind - {gm.graph.output_node()}))
    moved = {n for n in needed if n.op not in ("placeholder", "get_attr")}
    given = [
        n for n in nodes if n in moved and spec_of(n) is not None and not moved.issuperset(n.users)
    ]
    names = {n: prefix + n.name for n in given}
    specs = {names[n]: tensor_spec(n) for n in given}
    return Preamble(_first_part(gm, moved, given), specs, _rest(gm, moved, names))


def pinned(part: Part, held: Collection[str]) -> Part:
    """Fix the sizes of masked selections in the graph of a step or of a rule to those at capture.

    Before (the size of `padded` depends on `mask`):

        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %b0 = call_module[model.blocks.0](%x, %padded)

    After, where another size raises:

        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %fixed = fixed_shape(%padded, [1, 8, 64])
        %b0 = call_module[model.blocks.0](%x, %fixed)
    """
    preamble = split_preamble(part, held)
    if preamble is None:
        return part
    graph, attributes = fx.Graph(), dict[str, Any]()
    given = {name: graph.placeholder(name) for name in part.names}
    first = inline(graph, attributes, preamble.part.gm, preamble.part.operands(given))
    for (name, spec), node in zip(preamble.given.items(), first, strict=True):
        given[name] = graph.call_function(fixed_shape, (node, list(spec.shape)))
    rest = preamble.rest
    graph.output(tuple(inline(graph, attributes, rest.gm, rest.operands(given))))
    return Part.of(part.gm.get_submodule("model"), attributes, graph, part.gm._get_name())


def fixed_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor with a static shape; raise if its shape is another."""
    for size, expected in zip(tensor.shape, shape, strict=True):
        torch._check(size == expected)
    strides = torch.empty(shape, device="meta").stride()
    return tensor.contiguous().as_strided(shape, strides)


def _behind(gm: fx.GraphModule, held: Collection[str]) -> set[fx.Node]:
    """Return the nodes that depend on a block or on a cached tensor."""
    cached = [n for n in gm.graph.find_nodes(op="placeholder") if n.target in held]
    return descendants([*cached, *filter(is_block, gm.graph.nodes)])


def _with_items(nodes: set[fx.Node]) -> set[fx.Node]:
    """Return `nodes`, and every item of the containers among them."""
    containers = [node for node in nodes if spec_of(node) is None]
    items = {item for node in containers for item in items_of(node)} - nodes
    return _with_items(nodes | items) if items else nodes


def _first_part(gm: fx.GraphModule, moved: set[fx.Node], given: Iterable[fx.Node]) -> Part:
    graph = fx.Graph()
    places = gm.graph.find_nodes(op="placeholder")
    new = {node: add_input(graph, node, str(node.target)) for node in places}
    copy_nodes(graph, [n for n in body(gm.graph) if n in moved or n.op == "get_attr"], new)
    graph.output(tuple(new[n] for n in given))
    return _part(gm, graph, "Preamble")


def _rest(gm: fx.GraphModule, moved: set[fx.Node], given: Mapping[fx.Node, str]) -> Part:
    graph = fx.Graph()
    places = gm.graph.find_nodes(op="placeholder")
    new = {node: add_input(graph, node, str(node.target)) for node in places}
    new.update((node, add_input(graph, node, name)) for node, name in given.items())
    copy_nodes(graph, [n for n in body(gm.graph) if n not in moved], new)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], new.__getitem__))
    return _part(gm, graph, gm._get_name())


def _part(gm: fx.GraphModule, graph: fx.Graph, name: str) -> Part:
    return Part.of(gm.get_submodule("model"), attributes_of(gm, graph), graph, name)
