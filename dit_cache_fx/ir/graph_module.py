"""Graph modules over the live model: make them, and put one into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import LazyGraphModule
from dit_cache_fx.ir.codegen import customize_code
from dit_cache_fx.ir.copying import body, copy_nodes, results_of
from dit_cache_fx.ir.nodes import module_reads


def graph_module(
    model: nn.Module, attributes: Mapping[str, Any], graph: fx.Graph, name: str
) -> fx.GraphModule:
    """Make a GraphModule over the *live* model: `model.x` in the graph follows the model.

    It has no code until it runs, or `generate_code` is called with it.
    """
    root = nn.Module()
    root.model = model
    for key, value in attributes.items():
        if isinstance(value, torch.Tensor):
            root.register_buffer(key, value, persistent=False)
        else:
            setattr(root, key, value)
    customize_code(graph)
    gm = LazyGraphModule(root, graph, name)
    gm.__dict__.pop("model", None)
    gm._modules["model"] = model  # GraphModule has copied the attributes in the graph
    return gm


def attributes_of(gm: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """Return what `graph` reads from `gm` besides the model: constants and subgraphs."""
    targets = sorted({str(n.target) for n in module_reads(graph)})
    return {t: getattr(gm, t) for t in targets if "." not in t and hasattr(gm, t)}


def inline(
    graph: fx.Graph,
    attributes: dict[str, Any],
    gm: fx.GraphModule,
    inputs: Sequence[fx.Node],
) -> list[fx.Node]:
    """Add all of `gm`, called with `inputs`, to `graph`; return the nodes of its results.

    Its constants are added to `attributes`, renamed if necessary.
    """
    places = gm.graph.find_nodes(op="placeholder")
    new: dict[fx.Node, fx.Node] = dict(zip(places, inputs, strict=True))
    copy_nodes(graph, body(gm.graph), new)
    adopt(attributes, gm, new)
    return [new[n] if isinstance(n, fx.Node) else n for n in results_of(gm.graph)]


def adopt(attributes: dict[str, Any], gm: fx.GraphModule, new: Mapping[fx.Node, fx.Node]) -> None:
    """Add the attributes that `gm` reads from itself to those of another graph.

    `new`: node of `gm` -> its copy there, which reads another name if its own is taken.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        if "." not in node.target:
            new[node].target = _added(attributes, node.target, getattr(gm, node.target))


def _added(attributes: dict[str, Any], name: str, value: object) -> str:
    while name in attributes and attributes[name] is not value:
        name += "_"
    attributes[name] = value
    return name
