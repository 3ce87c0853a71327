"""Pass 4: replace each cached run by one node that either computes or reuses."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dit_cache_fx.ir.cached_run import cache_or_compute
from dit_cache_fx.ir.copying import copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.node_meta import block_of, mark
from dit_cache_fx.ir.nodes import ancestors, descendants
from dit_cache_fx.ir.program import Program, Region
from dit_cache_fx.passes.subgraphs import Subgraphs
from dit_cache_fx.strategies import Strategy


def guard_runs(program: Program, strategy: Strategy) -> None:
    """Replace each run by a `cache_or_compute` node over two subgraphs.

    Before (DeepCache):

        %b0 = call_module[model.blocks.0](%x, %temb)
        %b1 = call_module[model.blocks.1](%b0, %temb)
        %out = call_module[model.proj_out](%b1)

    After:

        %run_0 = cache_or_compute(0, run_0_compute, run_0_reuse, [], [%x, %temb])
        %b1 = getitem(%run_0, 0)
        %out = call_module[model.proj_out](%b1)

        run_0_compute(cached, distance, computed, gap, reach, way, x, temb):
            %b0 = call_module[model.blocks.0](%x, %temb)
            %b1 = call_module[model.blocks.1](%b0, %temb)
            return (%b1, %b1)                                # the value, and what to hold
        run_0_reuse(cached, distance, computed, gap, reach, way):
            return (%cached,)
    """
    attributes = attributes_of(program.gm, program.graph)
    graph = _Rewrite(program, strategy, attributes).run()
    program.gm = graph_module(program.model, attributes, graph, "Guarded")


class _Rewrite:
    """Copies a program to a new graph with its runs replaced; leaves out nodes without readers."""

    def __init__(self, program: Program, strategy: Strategy, attributes: dict[str, Any]) -> None:
        self.program = program
        self.strategy = strategy
        self.attributes = attributes
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.region_of = {program.node(n): r for r in program.regions for n in r.values}

    def run(self) -> fx.Graph:
        needed = self._needed()
        for node in self.program.graph.nodes:
            if node in needed or node.op == "placeholder":
                self._copy(node)
        self.graph.output(fx.map_arg(self.program.graph.output_node().args[0], self._copy))
        return self.graph

    def _needed(self) -> set[fx.Node]:
        """Return the nodes that run outside of the runs: for outputs, uncached blocks, operands."""
        program = self.program
        cached = {b for r in program.regions for b in r.blocks}
        roots = [*program.graph.output_node().all_input_nodes]
        roots += [c for c in program.block_calls() if block_of(c) not in cached]
        roots += [program.signal] if program.signal else []
        for region in program.regions:
            run_inputs, operands, _ = self._parts(region)
            roots += [*run_inputs, *operands]
        return ancestors(roots, stop=self.region_of) - set(self.region_of)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            region = self.region_of.get(node)
            if region is not None:
                self._guard(region)
            else:
                for needed in node.all_input_nodes:
                    self._copy(needed)
                copy_nodes(self.graph, [node], self.new)
        return self.new[node]

    def _parts(self, region: Region) -> tuple[list[fx.Node], list[fx.Node], set[fx.Node]]:
        """Return the run inputs, the other operands, and the members of a run."""
        program = self.program
        values = [program.node(name) for name in region.values]
        calls = [c for c in program.block_calls() if block_of(c) in region.blocks]
        between = descendants(calls) & ancestors([*calls, *values])
        members = between | set(calls)
        run_inputs = [program.node(name) for name in dict.fromkeys(region.run_inputs) if name]
        read = {n for member in members for n in member.all_input_nodes}
        operands = [
            n for n in program.graph.nodes if n in read and n not in members and n not in run_inputs
        ]
        return run_inputs, operands, members

    def _guard(self, region: Region) -> None:
        """Add the node of a run and its two subgraphs."""
        run_inputs, operands, members = self._parts(region)
        prefix = f"run_{region.index}"
        sides = Subgraphs(self.program, region, self.strategy, run_inputs, operands)
        self.attributes[f"{prefix}_compute"] = sides.compute(members)
        self.attributes[f"{prefix}_reuse"] = sides.reuse()
        inputs = [[self._copy(n) for n in nodes] for nodes in (run_inputs, operands)]
        targets = [self.graph.get_attr(f"{prefix}_{side}") for side in ("compute", "reuse")]
        run = self.graph.create_node(
            "call_function", cache_or_compute, (region.index, *targets, *inputs), name=prefix
        )
        for index, name in enumerate(region.values):
            value = self.program.node(name)
            self.new[value] = self.graph.create_node(
                "call_function", operator.getitem, (run, index), name=name
            )
            self.new[value].meta.update(value.meta)
            mark(self.new[value], block=None, within=None)
