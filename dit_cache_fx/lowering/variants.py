"""Lowering to one graph for each kind of step; which one runs is decided on the host."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dit_cache_fx.ir.cached_run import CachedRun, is_cached_run
from dit_cache_fx.ir.graph_text import trace_graph
from dit_cache_fx.ir.names import is_measured
from dit_cache_fx.ir.program import (
    BLOCK,
    ORIGIN,
    SIGNAL,
    Program,
    ancestors,
    attributes_of,
    is_view,
    items_of,
    spec_of,
    tensor_spec,
)
from dit_cache_fx.lowering.part import Part
from dit_cache_fx.strategies import CLOCK
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True, eq=False)
class Variants:
    """A program as graphs without a decision in them.

    `compute` gives `outputs` values of the model, then the tensors to hold; `reuse` the values of
    the model alone. Their operands are among the call's inputs, the clock (`distance`, `computed`,
    `gap`, `reach`, `way`), what is `held` (name -> spec, run after run) and what is `carried`.
    `prefix`, where the strategy has a rule of its own that looks at a value of the model, gives
    that value, then the carried tensors; None otherwise.
    """

    compute: Part
    reuse: Part
    prefix: Part | None
    held: dict[str, TensorSpec]
    carried: tuple[str, ...]
    outputs: int

    @property
    def measured(self) -> list[str]:
        """Which of `held` is what was measured of a value."""
        return [name for name in self.held if is_measured(name)]

    def mapped(self, function: Callable[[Part], Part]) -> Variants:
        """The same with `function` of each graph."""
        prefix = self.prefix and function(self.prefix)
        return replace(
            self, compute=function(self.compute), reuse=function(self.reuse), prefix=prefix
        )


def lower_variants(program: Program) -> Variants:
    """The graphs of a program's steps.

    Before:

        %c = call_module[model.time_embedder](%t)
        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%x, %c])
        %h = getitem(%run_0, 0)
        return [call_module[model.proj_out](%h, %c)]

    After, `compute` and `reuse`:

        %c = call_module[model.time_embedder](%t)           %c = call_module[model...](%t)
        %h = call_module[model.blocks.0](%x, %c)            return (call_module[model.proj_out](
        return (call_module[model.proj_out](%h, %c), %h)        %held_h_0, %c),)
    """
    prefix, carried = _prefix(program)
    compute, reuse = (_Side(program, kind, carried).lower() for kind in ("compute", "reuse"))
    for name, part in (("compute", compute), ("reuse", reuse), ("prefix", prefix)):
        if part is not None:
            trace_graph(name, part.gm)
    return Variants(compute, reuse, prefix, _held(program), carried, len(_results(program)))


def _held(program: Program) -> dict[str, TensorSpec]:
    """What is held of each value of each run, by the names that the runs' sides give it."""
    held: dict[str, TensorSpec] = {}
    for node in program.graph.nodes:
        if is_cached_run(node):
            side: fx.GraphModule = getattr(program.gm, CachedRun.of(node).reuse)
            places = [n for n in side.graph.nodes if n.op == "placeholder"]
            names = [n.name for n in places]
            for place in places[: names.index(next(iter(CLOCK)))]:
                held[place.name] = tensor_spec(place)
    return held


def _results(program: Program) -> list[fx.Node]:
    results: Any = program.graph.output_node().args[0]
    return list(results)


def _prefix(program: Program) -> tuple[Part | None, tuple[str, ...]]:
    """The graph of what the strategy's rule looks at, and the names of what else it computes.

    Views are not carried: the graphs that are given their base make them again.
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
    new: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.placeholder(node.name)
        elif node in needed:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[n] for n in (signal, *carried)))
    part = Part.of(program.model, attributes_of(program.gm, graph), graph, "Prefix")
    return part, tuple(n.name for n in carried)


def _needed(signal: fx.Node) -> set[fx.Node]:
    """What the signal is made of, with every item of the containers among it."""
    needed = ancestors([signal])
    return needed | {user for node in needed if spec_of(node) is None for user in items_of(node)}


class _Side:
    """Writes the graph of one kind of step: each run gives way to one of its two sides."""

    def __init__(self, program: Program, kind: str, carried: Sequence[str]) -> None:
        self.program = program
        self.kind = kind
        self.graph = fx.Graph()
        self.attributes = attributes_of(program.gm, program.graph)
        self.new: dict[fx.Node, Any] = {}
        self.sunk: dict[str, fx.Node] = {}  # a node that was copied into several runs runs once
        self.kept: list[fx.Node] = []
        self.clock = [self.graph.placeholder(name) for name in CLOCK]
        self.held = iter([self.graph.placeholder(name) for name in _held(program)])
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node in (*map(program.node, carried), *inputs):
            self.new[node] = self.graph.placeholder(node.name)
        #: the prefix has run these: a block among them is not to run again for its own sake
        self.done = set() if program.signal is None else _needed(program.signal)

    def lower(self) -> Part:
        for node in self.program.graph.nodes:
            if node in self.new or node.op == "output":
                continue
            if is_cached_run(node):
                self.new[node] = self._inlined(CachedRun.of(node))
            elif node.target is operator.getitem and isinstance(self.new[node.args[0]], list):
                self.new[node] = self.new[node.args[0]][node.args[1]]
            else:
                self._copy(node, self.new)
        self.graph.output((*(self.new[n] for n in _results(self.program)), *self.kept))
        return Part.of(self.program.model, self.attributes, self.graph, self.kind.capitalize())

    def _copy(self, node: fx.Node, new: dict[fx.Node, Any]) -> None:
        origin = node.meta.get(ORIGIN)
        if origin in self.sunk:
            new[node] = self.sunk[origin]
            return
        new[node] = self.graph.node_copy(node, new.__getitem__)
        new[node].meta.pop(SIGNAL, None)
        if node in self.done:
            new[node].meta.pop(BLOCK, None)
        if origin is not None:
            self.sunk[origin] = new[node]

    def _inlined(self, run: CachedRun) -> list[fx.Node]:
        """Copy one side of a run to the graph; returns the run's values."""
        side: fx.GraphModule = getattr(self.program.gm, getattr(run, self.kind))
        places = [n for n in side.graph.nodes if n.op == "placeholder"]
        inputs = [*run.starts, *(run.operands if self.kind == "compute" else ())]
        held = [next(self.held) for _ in range(len(places) - len(self.clock) - len(inputs))]
        given = [*held, *self.clock, *(self.new[n] for n in inputs)]
        new: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
        for node in side.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._copy(node, new)
        self.attributes.update(attributes_of(side, side.graph))
        results: Any = side.graph.output_node().args[0]
        values = next(len(r.values) for r in self.program.regions if r.index == run.index)
        self.kept += [new[n] for n in results[values:]]
        return [new[n] for n in results[:values]]
