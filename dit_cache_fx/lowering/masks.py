"""Sizes that depend on data: find them, and take a mask apart from the tensor that it selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.node_meta import mark_tensor
from dit_cache_fx.ir.nodes import spec_of, tensor_spec
from dit_cache_fx.values.tensor_spec import TensorSpec

_ATEN: Any = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)


def depends_on_data(node: fx.Node) -> bool:
    """Return whether values determine the size of an operator's result, or are its result."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    dynamic = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
    return dynamic and not _selects_by_index(node)


def _selects_by_index(node: fx.Node) -> bool:
    """Return whether an indexing has no mask among its indices: then its size is known."""
    if node.target is not _ATEN.index.Tensor:
        return False
    return all(spec_of(n) is not None and not _is_mask(n) for n in _indices(node))


def masks_apart(gm: fx.GraphModule, behind: AbstractSet[fx.Node]) -> fx.GraphModule:
    """Select by places what these nodes select by a mask from outside: the places need no block.

    Before (`b0` is in `behind`, `mask` is not):

        %rows = aten.index.Tensor(%b0, [None, %mask])

    After:

        %places = aten.nonzero(%mask)
        %place = aten.select.int(%places, 1, 0)
        %rows = aten.index.Tensor(%b0, [None, %place])
    """
    found = {n for n in behind if (masks := _masks(n)) and behind.isdisjoint(masks)}
    if not found:
        return gm
    graph = fx.Graph()
    places = gm.graph.find_nodes(op="placeholder")
    new: dict[fx.Node, Any] = {n: add_input(graph, n, str(n.target)) for n in places}

    def instead(node: fx.Node) -> fx.Node | None:
        return _by_places(graph, node, new) if node in found else None

    copy_nodes(graph, body(gm.graph), new, instead)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], new.__getitem__))
    model = gm.get_submodule("model")
    return graph_module(model, attributes_of(gm, graph), graph, gm._get_name())


def _masks(node: fx.Node) -> list[fx.Node]:
    """Return the masks by which a node selects; those without dimensions have no places."""
    args: Any = node.args
    if node.target is _ATEN.masked_select.default:
        return [args[1]]
    return [*filter(_is_mask, _indices(node))] if node.target is _ATEN.index.Tensor else []


def _indices(node: fx.Node) -> list[fx.Node]:
    """Return the indices of `aten.index`, without those of whole dimensions."""
    args: Any = node.args
    return [index for index in args[1] if index is not None]


def _is_mask(node: Any) -> bool:
    spec = spec_of(node) if isinstance(node, fx.Node) else None
    return spec is not None and spec.dtype in _MASKS and spec.ndim > 0


def _by_places(graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Add the selection of a node, by places; return its node."""
    args: Any = fx.map_arg(node.args, new.__getitem__)
    if node.target is _ATEN.masked_select.default:
        shape = torch.broadcast_shapes(*(tensor_spec(n).shape for n in args))
        tensor, mask = (_expanded(graph, n, shape) for n in args)
        args = tensor, [mask]
    count = _count(tensor_spec(node).shape, args[1])
    indices: list[fx.Node | None] = []
    for index in args[1]:
        indices += _places(graph, index, count) if _is_mask(index) else [index]
    selected = graph.call_function(_ATEN.index.Tensor, (args[0], indices))
    selected.meta.update(node.meta)
    return selected


def _count(selected: Sequence[int], indices: Sequence[fx.Node | None]) -> int:
    """Return the number of places that were selected at capture, from the result's shape.

    Indices next to one another are replaced where the first of them is, others in front. Masks have
    one dimension here, the last.
    """
    given = [dim for dim, index in enumerate(indices) if index is not None]
    together = given[-1] - given[0] < len(given)
    ndims = [1 if _is_mask(n) else len(tensor_spec(n).shape) for n in indices if n is not None]
    return selected[(given[0] if together else 0) + max(ndims) - 1]


def _places(graph: fx.Graph, mask: fx.Node, count: int) -> list[fx.Node]:
    """Add the places that a mask selects: an index for each of its dimensions."""
    ndim = len(tensor_spec(mask).shape)
    places = graph.call_function(_ATEN.nonzero.default, (mask,))
    _mark(places, mask, (count, ndim))
    columns = [graph.call_function(_ATEN.select.int, (places, 1, dim)) for dim in range(ndim)]
    for column in columns:
        _mark(column, mask, (count,))
    return columns


def _mark(node: fx.Node, mask: fx.Node, shape: Sequence[int]) -> None:
    spec = TensorSpec(torch.Size(shape), torch.int64, tensor_spec(mask).device)
    mark_tensor(node, spec.without_data(), spec.device)


def _expanded(graph: fx.Graph, node: fx.Node, shape: torch.Size) -> fx.Node:
    spec = tensor_spec(node)
    if spec.shape == shape:
        return node
    expanded = graph.call_function(_ATEN.expand.default, (node, [*shape]))
    mark_tensor(expanded, spec._replace(shape=shape).without_data(), spec.device)
    return expanded
