"""Pass 3: liveness. Find the values that leave each cached run, and the run input of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from dit_cache_fx.ir.node_meta import BlockId, block_of, mark
from dit_cache_fx.ir.nodes import ancestors, block_call_of, block_values, descendants
from dit_cache_fx.ir.program import Program, Region
from dit_cache_fx.ir.streams import padded_run_input, run_input_of, sample_like_output
from dit_cache_fx.strategies import Strategy


def find_values(program: Program, strategy: Strategy) -> None:
    """Find, for each run, the values with a reader that also runs on a reused step.

    Before: `program.regions[0]` is `[blocks.0, blocks.1, blocks.2]` in

        %b0 = call_module[model.blocks.0](%img, %txt)      # returns (img, txt)
        %img1 = getitem(%b0, 0); %txt1 = getitem(%b0, 1)
        %b1 = call_module[model.blocks.1](%img1, %txt1)
        ...
        %img3 = getitem(%b2, 0); %txt3 = getitem(%b2, 1)
        %out = call_module[model.proj_out](%img3)

    After: the same graph, and `program.regions[0].values` is `("img3",)`: the only one of six
    tensors that is cached. If the strategy reads the run's inputs, `run_inputs` names it (here
    "img"), otherwise None. A strategy of the whole model caches the output, with the sample as its
    run input.
    """
    if strategy.whole_model:
        program.regions = (_whole(program),)
    else:
        program.regions = _runs(program, strategy)
    for node in program.graph.nodes:  # values with readers stay
        mark(node, part=False)


def _runs(program: Program, strategy: Strategy) -> tuple[Region, ...]:
    run_inputs = _Cut(program, strategy).find()
    order = [n for n in program.graph.nodes if n in run_inputs]
    regions = []
    for region in program.regions:
        values = [v for v in order if block_of(block_call_of(v)) in region.blocks]
        names = tuple(None if (s := run_inputs[v]) is None else s.name for v in values)
        regions.append(replace(region, values=tuple(v.name for v in values), run_inputs=names))
    return tuple(r for r in regions if r.values)


def _whole(program: Program) -> Region:
    """Return one run of all blocks and everything after them."""
    blocks = tuple(block_of(call) for call in program.block_calls())
    run_input = sample_like_output(program)
    values = [node.name for node in program.outputs_of_blocks()]
    return Region(0, blocks, tuple(values), (run_input.name,) * len(values))


class _Cut:
    """The cut between the cached runs and everything that runs on a reused step."""

    def __init__(self, program: Program, strategy: Strategy) -> None:
        self.program = program
        self.strategy = strategy
        self._name = strategy.stream_name()
        cached = {b for region in program.regions for b in region.blocks}
        calls = [c for c in program.block_calls() if block_of(c) in cached]
        self.values = {v for call in calls for v in block_values(call)}
        self.always = [*_always(program, cached), *_handed_over(program)]

    def find(self) -> dict[fx.Node, fx.Node | None]:
        """Return each cached value with its run input.

        A run input is computed on a reused step as well and may need values of its own, so the
        search repeats until it reaches nothing new.
        """
        run_inputs: dict[fx.Node, fx.Node | None] = {}
        while True:
            roots = [*self.always, *(s for s in run_inputs.values() if s is not None)]
            reached = ancestors(roots, stop=self.values)
            new = [v for v in self.values if v in reached and v not in run_inputs]
            if not new:
                return run_inputs
            for value in new:
                run_inputs.update(self._run_inputs(value, reached))

    def _run_inputs(self, value: fx.Node, reached: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
        if not self.strategy.reads_run_input:
            return {value: None}
        run_input = self._run_input(value)
        if run_input is None:
            parts = [user for user in value.users if user in reached]
            found = {part: self._run_input(part) for part in parts if _is_slice(part)}
            if len(found) == len(parts) and all(found.values()):
                self.values = self.values - {value} | set(parts)
                return dict(found)
            run_input = padded_run_input(self.program, self._run(value), value, self._name)
        return {value: run_input}

    def _run_input(self, value: fx.Node) -> fx.Node | None:
        every = self.strategy.every_stream
        return run_input_of(self.program, self._run(value), value, self._name, every)

    def _run(self, value: fx.Node) -> Region:
        block = block_of(block_call_of(value))
        return next(r for r in self.program.regions if block in r.blocks)


def _always(program: Program, cached: set[BlockId]) -> list[fx.Node]:
    """Return the nodes that run on every step: the output, and blocks that are never cached."""
    roots = [program.graph.output_node()]
    roots += [c for c in program.block_calls() if block_of(c) not in cached]
    if program.signal is not None:
        roots.append(program.signal)
    return roots


def _handed_over(program: Program) -> list[fx.Node]:
    """Return the values that runs read from outside, in a U-shape from a block of another run."""
    read: list[fx.Node] = []
    for region in program.regions[1:]:
        calls = [c for c in program.block_calls() if block_of(c) in region.blocks]
        members = descendants(calls) & ancestors(calls) | set(calls)
        read += [n for m in members for n in m.all_input_nodes if n not in members]
    return read


def _is_slice(node: fx.Node) -> bool:
    """Return whether the node is a part of a joined stream (image rows of image and text)."""
    return node.target is torch.ops.aten.slice.Tensor
