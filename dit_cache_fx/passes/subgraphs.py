"""The two sides of a cached run, with the strategy's functions traced into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import DEVICE
from dit_cache_fx.ir.names import held_name
from dit_cache_fx.ir.program import (
    Program,
    Region,
    attributes_of,
    device_of,
    graph_module,
    inline,
    spec_of,
    tensor_spec,
)
from dit_cache_fx.strategies import CLOCK, Clock, Strategy
from dit_cache_fx.strategies.traced import agree, traced


class Subgraphs:
    """Builds the sides of one run.

    Both take, for each value, the tensors that are held for it, then those of a `Clock`, then what
    the run starts from; the compute side also its operands.
    """

    def __init__(
        self,
        program: Program,
        region: Region,
        strategy: Strategy,
        starts: Sequence[fx.Node],
        operands: Sequence[fx.Node],
    ) -> None:
        self.program = program
        self.region = region
        self.strategy = strategy
        self.starts = starts
        self.operands = operands
        self.attributes = attributes_of(program.gm, program.graph)

    def compute(self, members: set[fx.Node]) -> fx.GraphModule:
        """Runs the blocks; returns the values, then all that is to be held."""
        graph, held, clock, new = self._head([*self.starts, *self.operands])
        for node in self.program.graph.nodes:
            if node in members:
                new[node] = graph.node_copy(node, new.__getitem__)
        values = [new[self.program.node(name)] for name in self.region.values]
        kept: list[Any] = []
        for i, (value, start) in enumerate(zip(values, self._starts(new), strict=True)):
            kept += self._inline(graph, self.strategy.store, i, held[i], value, start, clock)
        graph.output((*values, *kept))
        return self._module(graph, "Compute")

    def reuse(self) -> fx.GraphModule:
        """Returns the values from what is held."""
        graph, held, clock, new = self._head(self.starts)
        values: list[Any] = []
        for i, start in enumerate(self._starts(new)):
            values += self._inline(graph, self._reuse, i, held[i], None, start, clock)
        graph.output(tuple(values))
        return self._module(graph, "Reuse")

    def _reuse(self, held: Any, value: None, start: Any, clock: Clock) -> Sequence[torch.Tensor]:
        return [self.strategy.reuse(held, start, clock)]

    def _head(
        self, inputs: Sequence[fx.Node]
    ) -> tuple[fx.Graph, list[list[fx.Node]], list[fx.Node], dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        slots = range(self.strategy.slots())
        held = [
            [graph.placeholder(held_name(name, slot)) for slot in slots]
            for name in self.region.values
        ]
        for name, places in zip(self.region.values, held, strict=True):
            value = self.program.node(name)
            for place in places:
                place.meta.update({"val": spec_of(value), DEVICE: device_of(value)})
        clock = [graph.placeholder(name) for name in CLOCK]
        new = {node: graph.placeholder(node.name) for node in inputs}
        for node, placeholder in new.items():
            placeholder.meta.update(node.meta)
        return graph, held, clock, new

    def _starts(self, new: dict[fx.Node, fx.Node]) -> list[fx.Node | None]:
        return [new[self.program.node(n)] if n else None for n in self.region.inputs]

    def _inline(
        self,
        graph: fx.Graph,
        function: Callable[..., Sequence[torch.Tensor]],
        index: int,
        held: list[fx.Node],
        value: fx.Node | None,
        start: fx.Node | None,
        clock: list[fx.Node],
    ) -> list[Any]:
        """Trace a strategy's function for value `index` and copy its graph behind `graph`."""
        spec = tensor_spec(self.program.node(self.region.values[index]))
        rest = {"value": value, "start": start}
        given = {name: node for name, node in rest.items() if node is not None}

        def flat(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            named = dict(zip(given, tensors[len(held) + len(CLOCK) :], strict=True))
            at = Clock(*tensors[len(held) : len(held) + len(CLOCK)])
            results = function(tensors[: len(held)], *map(named.get, rest), at)
            agree(self.strategy, name, results, right, why)
            return list(results)

        name, right, why = "reuse", [spec], "it stands for the value"
        if value is not None:
            name, right = "store", [spec] * self.strategy.slots()
            why = "as many as slots(), of the value's shape, dtype and device"

        specs = {f"held[{i}]": spec for i in range(len(held))}
        specs |= {f"clock.{name}": spec for name, spec in CLOCK.items()} | dict.fromkeys(
            given, spec
        )
        gm = traced(self.strategy, name, flat, specs)
        return inline(graph, self.attributes, gm, [*held, *clock, *given.values()])

    def _module(self, graph: fx.Graph, side: str) -> fx.GraphModule:
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        attributes = {name: value for name, value in self.attributes.items() if name in read}
        name = f"Run{self.region.index}{side}"
        return graph_module(self.program.model, attributes, graph, name)
