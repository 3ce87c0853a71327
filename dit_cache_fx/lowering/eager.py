"""Lowering for eager mode: the decision is a Python branch, taken by the step object."""

from __future__ import annotations

from torch import fx

from dit_cache_fx.cached_run import is_cached_run
from dit_cache_fx.program import Program, attributes_of, graph_module


def lower_eager(program: Program) -> fx.GraphModule:
    """A GraphModule called as `gm(step, *inputs)`.

    Before:

        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [%start], [%x])

    After (`decide` only where the strategy has a rule of its own):

        %decide = step.decide(%signal)
        %run_0 = step.run(0, run_0_compute, run_0_reuse, [%start], [%x])
    """
    return _Lowering(program).run()


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.step = self.graph.placeholder("step")
        self.decided = program.signal is None

    def run(self) -> fx.GraphModule:
        graph = self.program.graph
        for node in graph.nodes:
            if node.op == "placeholder":
                self.new[node] = self.graph.node_copy(node)
        for node in graph.nodes:
            if node.op != "output":
                self._copy(node)
        self.graph.output(fx.map_arg(graph.output_node().args[0], self._copy))
        attributes = attributes_of(self.program.gm, self.graph)
        return graph_module(self.program.model, attributes, self.graph, "CachedEager")

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self.new:
            return self.new[node]
        if is_cached_run(node):
            self._decide()
            arguments = fx.map_arg(node.args, self._copy)
            new = self.graph.create_node(
                "call_method", "run", (self.step, *arguments), name=node.name
            )
        else:
            new = self.graph.node_copy(node, self._copy)
        self.new[node] = new
        return new

    def _decide(self) -> None:
        """The decision comes before the first run, whatever order the graph is in."""
        if not self.decided:
            self.decided = True
            signal = self.program.signal
            assert signal is not None
            self.graph.call_method("decide", (self.step, self._copy(signal)))
