"""The two sides of a cached run, with the strategy's functions traced into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.alone import place_of
from dit_cache_fx.ir.copying import add_input, copy_nodes
from dit_cache_fx.ir.names import held_name, measured_name
from dit_cache_fx.ir.node_meta import mark_tensor
from dit_cache_fx.ir.program import (
    Program,
    Region,
    attributes_of,
    device_of,
    graph_module,
    inline,
    is_spread,
    spec_of,
    tensor_spec,
)
from dit_cache_fx.strategies import CLOCK, Clock, Strategy, without_ranks
from dit_cache_fx.strategies.traced import agree, refused, traced
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec


class Subgraphs:
    """Builds the sides of one run.

    Both take, for each value, the tensors that are held for it (what was measured of it is the
    last, where something is), then those of a `Clock`, then what the run starts from; the compute
    side also its operands.
    """

    def __init__(
        self,
        program: Program,
        region: Region,
        strategy: Strategy,
        run_inputs: Sequence[fx.Node],
        operands: Sequence[fx.Node],
    ) -> None:
        self.program = program
        self.region = region
        self.strategy = strategy
        self.run_inputs = run_inputs
        self.operands = operands
        self.attributes = attributes_of(program.gm, program.graph)
        self.slots = strategy.slots()
        self.measures = [self._traced("measure", i) for i in self._indexes()]

    def compute(self, members: set[fx.Node]) -> fx.GraphModule:
        """Runs the blocks; returns the values, then all that is to be held."""
        graph, held, clock, new = self._head([*self.run_inputs, *self.operands])
        copy_nodes(graph, [n for n in self.program.graph.nodes if n in members], new)
        values = [new[self.program.node(name)] for name in self.region.values]
        recorded: list[Any] = []
        for i, value in enumerate(values):
            given = [*held[i][: self.slots], *clock, value, *self._start(graph, i, new)]
            recorded += self._inlined(graph, self._traced("store", i), given)
            recorded += self._inlined(graph, self.measures[i], given)
        graph.output((*values, *recorded))
        return self._module(graph, "Compute")

    def reuse(self) -> fx.GraphModule:
        """Returns the values from what is held."""
        graph, held, clock, new = self._head(self.run_inputs)
        values: list[Any] = []
        for i in self._indexes():
            given = [*held[i][: self.slots], *clock, *self._start(graph, i, new)]
            values += self._inlined(graph, self._traced("reuse", i), given)
        graph.output(tuple(values))
        return self._module(graph, "Reuse")

    def _head(
        self, inputs: Sequence[fx.Node]
    ) -> tuple[fx.Graph, list[list[fx.Node]], list[fx.Node], dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        held = [self._places(graph, i) for i in self._indexes()]
        clock = [graph.placeholder(name) for name in CLOCK]
        new = {node: add_input(graph, node) for node in inputs}
        return graph, held, clock, new

    def _start(self, graph: fx.Graph, index: int, new: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """What a value starts from, in its dtype; empty where there is none."""
        name = self.region.inputs[index]
        if name is None:
            return []
        run_input, dtype = self.program.node(name), self._spec(index).dtype
        if tensor_spec(run_input).dtype == dtype:
            return [new[run_input]]
        cast = torch.ops.aten._to_copy.default
        return [graph.call_function(cast, (new[run_input],), {"dtype": dtype})]

    def _indexes(self) -> range:
        return range(len(self.region.values))

    def _places(self, graph: fx.Graph, index: int) -> list[fx.Node]:
        """The placeholders of what is held of a value, and of what was measured of it."""
        name = self.region.values[index]
        value = self.program.node(name)
        places = [graph.placeholder(held_name(name, slot)) for slot in range(self.slots)]
        for place in places:
            mark_tensor(place, spec_of(value), device_of(value))
        for result in _results(self.measures[index]):
            places.append(graph.placeholder(measured_name(name)))
            val = result.meta["val"]
            mark_tensor(places[-1], val.to("meta"), val.device)
        return places

    def _traced(self, name: str, index: int) -> fx.GraphModule:
        """The graph of a strategy's function, for what is held, the clock, value and start."""
        strategy, spec, start = self._strategy(index), self._spec(index), self.region.inputs[index]
        given = ["value"] * (name != "reuse") + ["start"] * (start is not None)
        slots, end = self.slots, self.slots + len(CLOCK)

        alone = self.program.alone
        own = held_name(self.region.values[index], 0)
        one = spec if alone is None else alone.spec(self.region.index, index, own)

        def flat(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            named = dict(zip(given, tensors[end:], strict=True))
            clock = Clock(*tensors[slots:end])
            return self._called(strategy, name, tensors[:slots], named, clock, one)

        specs = {f"held[{i}]": spec for i in range(slots)}
        specs |= {f"clock.{name}": spec for name, spec in CLOCK.items()}
        specs |= dict.fromkeys(given, spec)
        if alone is None:
            return traced(strategy, name, flat, specs)
        specs |= {f"clock.{n}": alone.clock(s, spec.device) for n, s in CLOCK.items()}
        place = place_of(own, one, spec, alone.count)
        places = [None if spec_name.startswith("clock.") else place for spec_name in specs]
        return traced(strategy, name, _by_row(flat, places, name != "measure"), specs)

    def _strategy(self, index: int) -> Strategy:
        """What is computed of a distributed tensor is of all of it already."""
        spread = is_spread(self.program.node(self.region.values[index]))
        return without_ranks(self.strategy) if spread else self.strategy

    def _called(
        self,
        strategy: Strategy,
        name: str,
        held: Sequence[torch.Tensor],
        named: Mapping[str, torch.Tensor],
        clock: Clock,
        spec: TensorSpec,
    ) -> Sequence[torch.Tensor]:
        """The results of a strategy's function, if they are what it has to give."""
        start = named.get("start")
        if name == "reuse":
            reused = [strategy.reuse(held, start, clock)]
            agree(strategy, name, reused, [spec], "it stands for the value")
            return reused
        if name == "measure":
            return self._numbers(strategy.measure(held, named["value"], start, clock))
        stored = strategy.store(held, named["value"], start, clock)
        why = "as many as slots(), of the value's shape, dtype and device"
        agree(strategy, name, stored, [spec] * self.slots, why)
        return list(stored)

    def _numbers(self, measured: Any) -> Sequence[torch.Tensor]:
        if measured is None:
            return []
        if not isinstance(measured, torch.Tensor) or measured.ndim != 1:
            what = TensorSpec.of(measured) if isinstance(measured, torch.Tensor) else repr(measured)
            raise refused(
                self.strategy, "measure", f"gave {what}; right is a tensor of one dimension or None"
            )
        return [measured]

    def _spec(self, index: int) -> TensorSpec:
        return tensor_spec(self.program.node(self.region.values[index]))

    def _inlined(self, graph: fx.Graph, gm: fx.GraphModule, given: list[fx.Node]) -> list[Any]:
        """Copy a strategy's function behind `graph`."""
        return inline(graph, self.attributes, gm, given)

    def _module(self, graph: fx.Graph, side: str) -> fx.GraphModule:
        read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
        attributes = {name: value for name, value in self.attributes.items() if name in read}
        name = f"Run{self.region.index}{side}"
        return graph_module(self.program.model, attributes, graph, name)


def _by_row(
    function: Callable[..., Sequence[torch.Tensor]], places: Sequence[RowPlace | None], back: bool
) -> Callable[..., Sequence[torch.Tensor]]:
    """A function of one row for several. `places`: of the rows in its tensors; None: in front.

    `back`: its results are as its first tensor; else their rows stay in front.
    """

    def mapped(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        rows = [t if p is None else p.in_front(t) for t, p in zip(tensors, places, strict=True)]
        results: Sequence[torch.Tensor] = torch.vmap(function)(*rows)
        place = places[0] if back else None
        return results if place is None else [place.put_back(t) for t in results]

    return mapped


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    results: Any = gm.graph.output_node().args[0]
    return list(results)
