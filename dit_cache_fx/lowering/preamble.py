"""Split off the parts that a compiler cannot hold in one graph: data-dependent sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, inline
from dit_cache_fx.ir.node_meta import is_block
from dit_cache_fx.ir.nodes import ancestors, descendants, spec_of, tensor_spec
from dit_cache_fx.lowering.part import Part
from dit_cache_fx.lowering.variants import Variants
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Preamble:
    """The part of a computed step that the host runs before the graph.

    `part` gives the inputs that the new `compute` reads besides the step's other operands. `given`:
    name -> spec of each (the sizes are those of the capture).
    """

    part: Part
    given: dict[str, TensorSpec]
    compute: Part


@dataclass(frozen=True)
class CompiledSteps:
    """Variants for a compiler. `preamble`: the part that the host runs before a computed step."""

    variants: Variants
    preamble: Preamble | None


def lower_compiled_steps(variants: Variants) -> CompiledSteps:
    """Return the variants without the parts that a compiler cannot hold in one graph."""
    preamble = split_preamble(variants.compute)
    if preamble is not None:
        variants = replace(variants, compute=preamble.compute)
    return CompiledSteps(variants, preamble)


def split_preamble(compute: Part) -> Preamble | None:
    """Split masked selections off the graph of a computed step; None if there are none.

    Before:

        %valid = aten.index.Tensor(%text, [%mask])
        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %b0 = call_module[model.blocks.0](%x, %padded)
        return (%b0, %b0)

    After, `part` returns `(%padded,)`, and `compute`, with a new operand `padded`:

        %b0 = call_module[model.blocks.0](%x, %padded)
        return (%b0, %b0)
    """
    gm = compute.gm
    nodes = list(gm.graph.nodes)
    behind = descendants(n for n in nodes if is_block(n))
    selecting = [n for n in nodes if _depends_on_data(n) and n not in behind]
    if not selecting:
        return None
    needed = ancestors(descendants(selecting) - behind - {gm.graph.output_node()})
    moved = {n for n in needed if n.op not in ("placeholder", "get_attr")}
    given = [
        n for n in nodes if n in moved and spec_of(n) is not None and not moved.issuperset(n.users)
    ]
    specs = {n.name: tensor_spec(n) for n in given}
    return Preamble(_first_part(gm, moved, given), specs, _rest(gm, moved, given))


def pinned(compute: Part) -> Part:
    """Fix the sizes of masked selections in the graph of a computed step to those at capture.

    Before (the size of `padded` depends on `mask`):

        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %b0 = call_module[model.blocks.0](%x, %padded)

    After, where another size raises:

        %padded = aten.constant_pad_nd(%valid, [0, 3])
        %fixed = fixed_shape(%padded, [1, 8, 64])
        %b0 = call_module[model.blocks.0](%x, %fixed)
    """
    preamble = split_preamble(compute)
    if preamble is None:
        return compute
    graph, attributes = fx.Graph(), dict[str, Any]()
    given = {name: graph.placeholder(name) for name in compute.names}
    first = inline(graph, attributes, preamble.part.gm, preamble.part.operands(given))
    for (name, spec), node in zip(preamble.given.items(), first, strict=True):
        given[name] = graph.call_function(fixed_shape, (node, list(spec.shape)))
    rest = preamble.compute
    graph.output(tuple(inline(graph, attributes, rest.gm, rest.operands(given))))
    return Part.of(compute.gm.get_submodule("model"), attributes, graph, "Compute")


def fixed_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor with a static shape; raise if its shape is another."""
    for size, expected in zip(tensor.shape, shape, strict=True):
        torch._check(size == expected)
    strides = torch.empty(shape, device="meta").stride()
    return tensor.contiguous().as_strided(shape, strides)


def _depends_on_data(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    dynamic = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
    return dynamic and not _selects_by_index(node)


def _selects_by_index(node: fx.Node) -> bool:
    """Return whether an indexing has no mask among its indices: then its size is known."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    specs = [spec_of(n) for n in node.all_input_nodes[1:]]
    return all(s is not None and s.dtype not in (torch.bool, torch.uint8) for s in specs)


def _first_part(gm: fx.GraphModule, moved: set[fx.Node], given: Iterable[fx.Node]) -> Part:
    graph = fx.Graph()
    places = gm.graph.find_nodes(op="placeholder")
    new = {node: add_input(graph, node, str(node.target)) for node in places}
    copy_nodes(graph, [n for n in body(gm.graph) if n in moved or n.op == "get_attr"], new)
    graph.output(tuple(new[n] for n in given))
    return _part(gm, graph, "Preamble")


def _rest(gm: fx.GraphModule, moved: set[fx.Node], given: Iterable[fx.Node]) -> Part:
    graph = fx.Graph()
    places = gm.graph.find_nodes(op="placeholder")
    new = {node: add_input(graph, node, str(node.target)) for node in places}
    new.update((node, add_input(graph, node)) for node in given)
    copy_nodes(graph, [n for n in body(gm.graph) if n not in moved], new)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], new.__getitem__))
    return _part(gm, graph, "Compute")


def _part(gm: fx.GraphModule, graph: fx.Graph, name: str) -> Part:
    return Part.of(gm.get_submodule("model"), attributes_of(gm, graph), graph, name)
