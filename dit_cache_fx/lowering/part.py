"""A graph that takes its operands by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn

from dit_cache_fx._torch import generate_code
from dit_cache_fx.ir.graph_module import graph_module
from dit_cache_fx.ir.nodes import is_kept

_T = TypeVar("_T")


def runnable(
    model: nn.Module, attributes: Mapping[str, Any], graph: fx.Graph, name: str
) -> fx.GraphModule:
    """Make a GraphModule that Dynamo can trace."""
    gm = graph_module(model, attributes, graph, name)
    generate_code(gm)
    return gm


@dataclass(frozen=True)
class Part:
    """A lowered graph. `names`: its operands, in order; all of them are read."""

    gm: fx.GraphModule
    names: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, attributes: Mapping[str, Any], graph: fx.Graph, name: str) -> Part:
        """Make a part of a graph whose placeholders have the names of its operands."""
        graph.eliminate_dead_code(is_kept)
        for node in [n for n in graph.find_nodes(op="placeholder") if not n.users]:
            graph.erase_node(node)
        names = tuple(str(n.target) for n in graph.find_nodes(op="placeholder"))
        read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
        own = {key: value for key, value in attributes.items() if key in read}
        return Part(runnable(model, own, graph, name), names)

    @property
    def run(self) -> Callable[..., Sequence[torch.Tensor]]:
        """Return the graph as a function of its operands."""
        forward: Callable[..., Sequence[torch.Tensor]] = self.gm.forward
        return forward

    def operands(self, given: Mapping[str, _T]) -> list[_T]:
        """Select the graph's operands from `given`."""
        return [given[name] for name in self.names]


@dataclass(frozen=True)
class CompiledPart(Part):
    """A lowered graph, and the compiled function that runs in its place."""

    compiled: Callable[..., Sequence[torch.Tensor]]

    @property
    def run(self) -> Callable[..., Sequence[torch.Tensor]]:
        return self.compiled
