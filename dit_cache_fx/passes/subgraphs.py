"""Build the two sides of a cached run, with the strategy's functions traced into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.alone import place_of
from dit_cache_fx.ir.copying import add_input, copy_nodes, results_of
from dit_cache_fx.ir.graph_module import attributes_of, graph_module, inline
from dit_cache_fx.ir.names import cached_name, measured_name
from dit_cache_fx.ir.node_meta import mark_tensor
from dit_cache_fx.ir.nodes import device_of, is_spread, spec_of, tensor_spec
from dit_cache_fx.ir.program import Program, Region
from dit_cache_fx.strategies import CLOCK, Clock, Strategy, without_ranks
from dit_cache_fx.strategies.traced import agree, refused, traced
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec


class Subgraphs:
    """Builds the two sides of one run.

    For each value, both sides take the cached tensors (the measurement last, if there is one), then
    those of a `Clock`, then the run's inputs. The compute side also takes its operands.
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
        """Build the side that runs the blocks; it returns the values, then the tensors to cache."""
        graph, cached, clock, new = self._head([*self.run_inputs, *self.operands])
        copy_nodes(graph, [n for n in self.program.graph.nodes if n in members], new)
        values = [new[self.program.node(name)] for name in self.region.values]
        recorded: list[Any] = []
        for i, value in enumerate(values):
            given = [*cached[i][: self.slots], *clock, value, *self._run_input(graph, i, new)]
            recorded += self._inlined(graph, self._traced("store", i), given)
            recorded += self._inlined(graph, self.measures[i], given)
        graph.output((*values, *recorded))
        return self._module(graph, "Compute")

    def reuse(self) -> fx.GraphModule:
        """Build the side that returns the values from the cached tensors."""
        graph, cached, clock, new = self._head(self.run_inputs)
        values: list[Any] = []
        for i in self._indexes():
            given = [*cached[i][: self.slots], *clock, *self._run_input(graph, i, new)]
            values += self._inlined(graph, self._traced("reuse", i), given)
        graph.output(tuple(values))
        return self._module(graph, "Reuse")

    def _head(
        self, inputs: Sequence[fx.Node]
    ) -> tuple[fx.Graph, list[list[fx.Node]], list[fx.Node], dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        cached = [self._places(graph, i) for i in self._indexes()]
        clock = [graph.placeholder(name) for name in CLOCK]
        new = {node: add_input(graph, node) for node in inputs}
        return graph, cached, clock, new

    def _run_input(self, graph: fx.Graph, index: int, new: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """Return the run input of a value, in its dtype; empty if there is none."""
        name = self.region.run_inputs[index]
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
        """Return the placeholders of a value's cached tensors, and of its measurement."""
        name = self.region.values[index]
        value = self.program.node(name)
        places = [graph.placeholder(cached_name(name, slot)) for slot in range(self.slots)]
        for place in places:
            mark_tensor(place, spec_of(value), device_of(value))
        for result in results_of(self.measures[index].graph):
            places.append(graph.placeholder(measured_name(name)))
            val = result.meta["val"]
            mark_tensor(places[-1], val.to("meta"), val.device)
        return places

    def _traced(self, name: str, index: int) -> fx.GraphModule:
        """Trace a strategy's function for cached tensors, clock, value and run input."""
        strategy, spec = self._strategy(index), self._spec(index)
        has_run_input = self.region.run_inputs[index] is not None
        given = ["value"] * (name != "reuse") + ["run_input"] * has_run_input
        slots, end = self.slots, self.slots + len(CLOCK)

        alone = self.program.alone
        own = cached_name(self.region.values[index], 0)
        one = spec if alone is None else alone.spec(self.region.index, index, own)

        def flat(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            named = dict(zip(given, tensors[end:], strict=True))
            clock = Clock(*tensors[slots:end])
            return self._called(strategy, name, tensors[:slots], named, clock, one)

        specs = {f"cached[{i}]": spec for i in range(slots)}
        specs |= {f"clock.{name}": spec for name, spec in CLOCK.items()}
        specs |= dict.fromkeys(given, spec)
        if alone is None:
            return traced(strategy, name, flat, specs)
        specs |= {f"clock.{n}": alone.clock(s, spec.device) for n, s in CLOCK.items()}
        place = place_of(own, one, spec, alone.count)
        places = [None if spec_name.startswith("clock.") else place for spec_name in specs]
        return traced(strategy, name, _by_row(flat, places, name != "measure"), specs)

    def _strategy(self, index: int) -> Strategy:
        """Return the strategy for a value. Results on a distributed tensor are global already."""
        spread = is_spread(self.program.node(self.region.values[index]))
        return without_ranks(self.strategy) if spread else self.strategy

    def _called(
        self,
        strategy: Strategy,
        name: str,
        cached: Sequence[torch.Tensor],
        named: Mapping[str, torch.Tensor],
        clock: Clock,
        spec: TensorSpec,
    ) -> Sequence[torch.Tensor]:
        """Call a strategy's function, and check its results."""
        run_input = named.get("run_input")
        if name == "reuse":
            reused = [strategy.reuse(cached, run_input, clock)]
            agree(strategy, name, reused, [spec], "it replaces the value")
            return reused
        if name == "measure":
            return self._numbers(strategy.measure(cached, named["value"], run_input, clock))
        stored = strategy.store(cached, named["value"], run_input, clock)
        why = "as many as slots(), of the value's shape, dtype and device"
        agree(strategy, name, stored, [spec] * self.slots, why)
        return list(stored)

    def _numbers(self, measured: Any) -> Sequence[torch.Tensor]:
        if measured is None:
            return []
        if not isinstance(measured, torch.Tensor) or measured.ndim != 1:
            what = TensorSpec.of(measured) if isinstance(measured, torch.Tensor) else repr(measured)
            raise refused(
                self.strategy,
                "measure",
                f"gave {what}; expected a tensor of one dimension, or None",
            )
        return [measured]

    def _spec(self, index: int) -> TensorSpec:
        return tensor_spec(self.program.node(self.region.values[index]))

    def _inlined(self, graph: fx.Graph, gm: fx.GraphModule, given: list[fx.Node]) -> list[Any]:
        """Append a copy of a strategy's function to `graph`."""
        return inline(graph, self.attributes, gm, given)

    def _module(self, graph: fx.Graph, side: str) -> fx.GraphModule:
        read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
        attributes = {name: value for name, value in self.attributes.items() if name in read}
        name = f"Run{self.region.index}{side}"
        return graph_module(self.program.model, attributes, graph, name)


def _by_row(
    function: Callable[..., Sequence[torch.Tensor]], places: Sequence[RowPlace | None], back: bool
) -> Callable[..., Sequence[torch.Tensor]]:
    """Make a function of one row one of many rows. `places`: where tensors have rows; None: dim 0.

    `back`: lay the results out as the first tensor; otherwise their rows stay in dimension 0.
    """

    def mapped(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        rows = [t if p is None else p.in_front(t) for t, p in zip(tensors, places, strict=True)]
        results: Sequence[torch.Tensor] = torch.vmap(function)(*rows)
        place = places[0] if back else None
        return results if place is None else [place.put_back(t) for t in results]

    return mapped
