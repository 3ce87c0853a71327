"""Lower to one graph for each kind of step; the host decides which one runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dit_cache_fx.ir.cached_run import CachedRun, cached_runs, is_cached_run
from dit_cache_fx.ir.copying import add_input, body, copy_nodes, results_of
from dit_cache_fx.ir.graph_module import adopt, attributes_of
from dit_cache_fx.ir.graph_text import trace_graph
from dit_cache_fx.ir.names import is_measured
from dit_cache_fx.ir.node_meta import is_block, mark, mark_tensor, meta_of
from dit_cache_fx.ir.nodes import ancestors, is_view, items_of, spec_of, tensor_spec
from dit_cache_fx.ir.program import Program
from dit_cache_fx.lowering.part import Part
from dit_cache_fx.strategies import CLOCK
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True, eq=False)
class Variants:
    """A program as graphs without a decision in them.

    `compute` gives `outputs` values of the model, then the tensors to cache; `reuse` gives the
    values only. Their operands are among the call's inputs, the clock (`distance`, `computed`,
    `gap`, `reach`, `way`), the `cached` tensors (name -> spec, run after run) and the `carried`
    ones. `prefix`, if the strategy has a rule that reads a value of the model, gives that value,
    then the carried tensors; otherwise None.
    """

    compute: Part
    reuse: Part
    prefix: Part | None
    cached: dict[str, TensorSpec]
    carried: tuple[str, ...]
    outputs: int

    @property
    def measured(self) -> list[str]:
        """Return the names in `cached` that are measurements."""
        return [name for name in self.cached if is_measured(name)]

    def mapped(self, function: Callable[[Part], Part]) -> Variants:
        """Apply `function` to each graph."""
        prefix = self.prefix and function(self.prefix)
        return replace(
            self, compute=function(self.compute), reuse=function(self.reuse), prefix=prefix
        )


def lower_variants(program: Program) -> Variants:
    """Build the graphs of a program's steps.

    Before:

        %c = call_module[model.time_embedder](%t)
        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%x, %c])
        %h = getitem(%run_0, 0)
        return [call_module[model.proj_out](%h, %c)]

    After, `compute` and `reuse`:

        %c = call_module[model.time_embedder](%t)           %c = call_module[model...](%t)
        %h = call_module[model.blocks.0](%x, %c)            return (call_module[model.proj_out](
        return (call_module[model.proj_out](%h, %c), %h)        %cached_h_0, %c),)
    """
    prefix, carried = _prefix(program)
    compute, reuse = (_Side(program, kind, carried).lower() for kind in ("compute", "reuse"))
    for name, part in (("compute", compute), ("reuse", reuse), ("prefix", prefix)):
        if part is not None:
            trace_graph(name, part.gm)
    outputs = len(results_of(program.graph))
    return Variants(compute, reuse, prefix, _cached(program), carried, outputs)


def _cached(program: Program) -> dict[str, TensorSpec]:
    """Return the specs of the cached tensors of all runs, by the operand names of their sides."""
    cached: dict[str, TensorSpec] = {}
    for run in cached_runs(program.graph):
        side: fx.GraphModule = getattr(program.gm, run.reuse)
        places = side.graph.find_nodes(op="placeholder")
        names = [n.name for n in places]
        for place in places[: names.index(next(iter(CLOCK)))]:
            cached[place.name] = tensor_spec(place)
    return cached


def _prefix(program: Program) -> tuple[Part | None, tuple[str, ...]]:
    """Build the graph of the rule's signal, and return the names of what else it computes.

    Views are not carried: the graphs rebuild them from their base.
    """
    signal = program.signal
    if signal is None:
        return None, ()
    needed = _needed(signal)
    inside = {n for n in needed if n.op not in ("placeholder", "get_attr") and not is_view(n)}
    carried = [
        n
        for n in program.graph.nodes
        if n in inside and spec_of(n) is not None and not inside.issuperset(n.users)
    ]
    graph = fx.Graph()
    places = program.graph.find_nodes(op="placeholder")
    new = {node: add_input(graph, node) for node in places}
    copy_nodes(graph, [n for n in program.graph.nodes if n in needed], new)
    graph.output(tuple(new[n] for n in (signal, *carried)))
    part = Part.of(program.model, attributes_of(program.gm, graph), graph, "Prefix")
    return part, tuple(n.name for n in carried)


def _needed(signal: fx.Node) -> set[fx.Node]:
    """Return the nodes that the signal needs, with every item of their containers."""
    needed = ancestors([signal])
    return needed | {user for node in needed if spec_of(node) is None for user in items_of(node)}


class _Side:
    """Writes the graph of one kind of step: each run is replaced by one of its two sides."""

    def __init__(self, program: Program, kind: str, carried: Sequence[str]) -> None:
        self.program = program
        self.kind = kind
        self.graph = fx.Graph()
        self.attributes = attributes_of(program.gm, program.graph)
        self.new: dict[fx.Node, Any] = {}
        self.sunk: dict[str, fx.Node] = {}  # a node that was copied into several runs runs once
        self.recorded: list[fx.Node] = []
        self.clock = [self.graph.placeholder(name) for name in CLOCK]
        self.cached = iter([self._held(name, spec) for name, spec in _cached(program).items()])
        inputs = program.graph.find_nodes(op="placeholder")
        for node in (*map(program.node, carried), *inputs):
            self.new[node] = add_input(self.graph, node)
        #: nodes of the prefix: blocks among them do not run again for their own sake
        self.done = set() if program.signal is None else _needed(program.signal)

    def _held(self, name: str, spec: TensorSpec) -> fx.Node:
        """Add the placeholder of a cached tensor."""
        place = self.graph.placeholder(name)
        mark_tensor(place, spec.without_data(), spec.device)
        return place

    def lower(self) -> Part:
        copy_nodes(self.graph, body(self.program.graph), self.new, self._instead)
        for node in self.graph.nodes:
            mark(node, signal=False)
        for node in filter(is_block, self.done):
            mark(self.new[node], block=None)
        self.graph.output((*(self.new[n] for n in results_of(self.program.graph)), *self.recorded))
        return Part.of(self.program.model, self.attributes, self.graph, self.kind.capitalize())

    def _instead(self, node: fx.Node) -> Any:
        """Return the replacement of a run, of one of its values, or of an existing node."""
        if is_cached_run(node):
            return self._inlined(CachedRun.of(node))
        values = self.new[node.all_input_nodes[0]] if node.target is operator.getitem else None
        if isinstance(values, list):
            return values[node.args[1]]  # type: ignore[index]
        return self._copied_before(node)

    def _copied_before(self, node: fx.Node) -> fx.Node | None:
        origin = meta_of(node).origin
        return None if origin is None else self.sunk.get(origin)

    def _inlined(self, run: CachedRun) -> list[fx.Node]:
        """Copy one side of a run to the graph; return the run's values."""
        side: fx.GraphModule = getattr(self.program.gm, getattr(run, self.kind))
        places = side.graph.find_nodes(op="placeholder")
        inputs = [*run.run_inputs, *(run.operands if self.kind == "compute" else ())]
        cached = [next(self.cached) for _ in range(len(places) - len(self.clock) - len(inputs))]
        given = [*cached, *self.clock, *(self.new[n] for n in inputs)]
        new: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
        copy_nodes(self.graph, body(side.graph), new, self._copied_before)
        origins = {meta_of(node).origin: node for node in body(side.graph)}
        self.sunk.update((name, new[node]) for name, node in origins.items() if name is not None)
        adopt(self.attributes, side, new)
        results = results_of(side.graph)
        values = next(len(r.values) for r in self.program.regions if r.index == run.index)
        self.recorded += [new[n] for n in results[values:]]
        return [new[n] for n in results[:values]]
