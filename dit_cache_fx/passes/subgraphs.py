"""The two sides of a cached run, with the strategy's functions traced into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import DEVICE, trace_shapes
from dit_cache_fx.errors import VerifyError
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
from dit_cache_fx.strategies import Clock, Strategy
from dit_cache_fx.strategies.signals import MEASURED
from dit_cache_fx.values.tensor_spec import TensorSpec

_SCALAR = TensorSpec(torch.Size([]), torch.float64, torch.device("cpu"))


class Subgraphs:
    """Builds the sides of one run.

    Both take, for each value, the tensors that are held for it (what was measured of it is the
    last, where something is), then `distance` and `computed` (float64, no dimensions), then what
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
        self.slots = strategy.slots()
        self.measures = [self._traced(_measure(strategy), i, True) for i in self._indexes()]

    def compute(self, members: set[fx.Node]) -> fx.GraphModule:
        """Runs the blocks; returns the values, then all that is to be held."""
        graph, held, clock, new = self._head([*self.starts, *self.operands])
        for node in self.program.graph.nodes:
            if node in members:
                new[node] = graph.node_copy(node, new.__getitem__)
        values = [new[self.program.node(name)] for name in self.region.values]
        kept: list[Any] = []
        for i, value in enumerate(values):
            given = [*held[i][: self.slots], *clock, value, *self._start(graph, i, new)]
            new_held = self._inlined(graph, self._traced(self.strategy.store, i, True), given)
            kept += self._checked(new_held, self.slots, i)
            kept += self._inlined(graph, self.measures[i], given)
        graph.output((*values, *kept))
        return self._module(graph, "Compute")

    def reuse(self) -> fx.GraphModule:
        """Returns the values from what is held."""
        graph, held, clock, new = self._head(self.starts)
        values: list[Any] = []
        for i in self._indexes():
            given = [*held[i][: self.slots], *clock, *self._start(graph, i, new)]
            reused = self._inlined(graph, self._traced(self._reuse, i, False), given)
            values += self._checked(reused, 1, i)
        graph.output(tuple(values))
        return self._module(graph, "Reuse")

    def _reuse(self, held: Any, value: None, start: Any, clock: Clock) -> Sequence[torch.Tensor]:
        return [self.strategy.reuse(held, start, clock)]

    def _head(
        self, inputs: Sequence[fx.Node]
    ) -> tuple[fx.Graph, list[list[fx.Node]], list[fx.Node], dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        held = [self._places(graph, i) for i in self._indexes()]
        clock = [graph.placeholder(name) for name in Clock._fields]
        new = {node: graph.placeholder(node.name) for node in inputs}
        for node, placeholder in new.items():
            placeholder.meta.update(node.meta)
        return graph, held, clock, new

    def _start(self, graph: fx.Graph, index: int, new: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """What a value starts from, in its dtype; empty where there is none."""
        name = self.region.inputs[index]
        if name is None:
            return []
        start, value = self.program.node(name), self.program.node(self.region.values[index])
        dtype = tensor_spec(value).dtype
        if tensor_spec(start).dtype == dtype:
            return [new[start]]
        cast = torch.ops.aten._to_copy.default
        return [graph.call_function(cast, (new[start],), {"dtype": dtype})]

    def _indexes(self) -> range:
        return range(len(self.region.values))

    def _places(self, graph: fx.Graph, index: int) -> list[fx.Node]:
        """The placeholders of what is held of a value, and of what was measured of it."""
        name = self.region.values[index]
        value = self.program.node(name)
        places = [graph.placeholder(f"held_{name}_{slot}") for slot in range(self.slots)]
        for place in places:
            place.meta.update({"val": spec_of(value), DEVICE: device_of(value)})
        for result in _results(self.measures[index]):
            places.append(graph.placeholder(f"{MEASURED}_{name}"))
            val = result.meta["val"]
            places[-1].meta.update({"val": val.to("meta"), DEVICE: val.device})
        return places

    def _traced(
        self, function: Callable[..., Sequence[torch.Tensor]], index: int, computes: bool
    ) -> fx.GraphModule:
        """The graph of a strategy's function, for what is held, the clock, value and start."""
        spec = tensor_spec(self.program.node(self.region.values[index]))
        has_start = self.region.inputs[index] is not None
        slots, fields = self.slots, len(Clock._fields)

        def flat(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            rest = iter(tensors[slots + fields :])
            arguments = [next(rest) if given else None for given in (computes, has_start)]
            at = Clock(*tensors[slots : slots + fields])
            return list(function(tensors[:slots], *arguments, at))

        specs = [spec] * slots + [_SCALAR] * fields + [spec] * (computes + has_start)
        return trace_shapes(flat, specs)

    def _inlined(self, graph: fx.Graph, gm: fx.GraphModule, given: list[fx.Node]) -> list[Any]:
        """Copy a strategy's function behind `graph`."""
        return inline(graph, self.attributes, gm, given)

    def _checked(self, results: list[Any], expected: int, index: int) -> list[Any]:
        if len(results) != expected or not all(isinstance(r, fx.Node) for r in results):
            raise VerifyError(
                f"strategy {type(self.strategy).__name__} gave {len(results)} tensors for "
                f"{self.region.values[index]}, {expected} expected (slots() for store)"
            )
        return results

    def _module(self, graph: fx.Graph, side: str) -> fx.GraphModule:
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        attributes = {name: value for name, value in self.attributes.items() if name in read}
        name = f"Run{self.region.index}{side}"
        return graph_module(self.program.model, attributes, graph, name)


def _measure(strategy: Strategy) -> Callable[..., Sequence[torch.Tensor]]:
    """`measure`, with a list of one tensor or of none."""

    def measure(*arguments: Any) -> Sequence[torch.Tensor]:
        measured = strategy.measure(*arguments)
        return [] if measured is None else [measured]

    return measure


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    results: Any = gm.graph.output_node().args[0]
    return list(results)
