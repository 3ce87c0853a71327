"""Pass 2, liveness: which values leave a cached run, and what each one starts from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from dit_cache_fx.ir.node_meta import BlockId, block_of, mark
from dit_cache_fx.ir.program import (
    Program,
    Region,
    ancestors,
    block_call_of,
    block_values,
    descendants,
)
from dit_cache_fx.ir.streams import padded_start, sample_like_output, start_of
from dit_cache_fx.strategies import Strategy


def find_values(program: Program, strategy: Strategy) -> None:
    """For each run the values that something reads which runs on a reused step too.

    Before: `program.regions[0]` is `[blocks.0, blocks.1, blocks.2]` in

        %b0 = call_module[model.blocks.0](%img, %txt)      # returns (img, txt)
        %img1 = getitem(%b0, 0); %txt1 = getitem(%b0, 1)
        %b1 = call_module[model.blocks.1](%img1, %txt1)
        ...
        %img3 = getitem(%b2, 0); %txt3 = getitem(%b2, 1)
        %out = call_module[model.proj_out](%img3)

    After: the same graph, and `program.regions[0].values` is `("img3",)`: the only one of six
    tensors that is held. Where the strategy reads what a run starts from, `inputs` names it (here
    "img"), else None. A strategy of the whole model holds the output, which starts from the sample.
    """
    if strategy.whole_model:
        program.regions = (_whole(program),)
    else:
        program.regions = _runs(program, strategy)
    for node in program.graph.nodes:  # those that are read stay
        mark(node, part=False)


def _runs(program: Program, strategy: Strategy) -> tuple[Region, ...]:
    starts = _Cut(program, strategy).find()
    order = [n for n in program.graph.nodes if n in starts]
    regions = []
    for region in program.regions:
        values = [v for v in order if block_of(block_call_of(v)) in region.blocks]
        names = tuple(None if (s := starts[v]) is None else s.name for v in values)
        regions.append(replace(region, values=tuple(v.name for v in values), inputs=names))
    return tuple(r for r in regions if r.values)


def _whole(program: Program) -> Region:
    """One run of all blocks and what follows them."""
    blocks = tuple(block_of(call) for call in program.block_calls())
    start = sample_like_output(program)
    values = [node.name for node in program.outputs_of_blocks()]
    return Region(0, blocks, tuple(values), (start.name,) * len(values))


class _Cut:
    """Where everything that runs on a reused step is cut off from the cached runs."""

    def __init__(self, program: Program, strategy: Strategy) -> None:
        self.program = program
        self.strategy = strategy
        self._name = strategy.stream_name()
        cached = {b for region in program.regions for b in region.blocks}
        calls = [c for c in program.block_calls() if block_of(c) in cached]
        self.values = {v for call in calls for v in block_values(call)}
        self.always = [*_always(program, cached), *_handed_over(program)]

    def find(self) -> dict[fx.Node, fx.Node | None]:
        """Each value that is held, with what it starts from.

        What a value starts from runs on a reused step as well, and may need values of its own:
        so the search goes on until nothing new is reached.
        """
        starts: dict[fx.Node, fx.Node | None] = {}
        while True:
            roots = [*self.always, *(s for s in starts.values() if s is not None)]
            reached = ancestors(roots, stop=self.values)
            new = [v for v in self.values if v in reached and v not in starts]
            if not new:
                return starts
            for value in new:
                starts.update(self._starts(value, reached))

    def _starts(self, value: fx.Node, reached: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
        if not self.strategy.reads_start:
            return {value: None}
        start = self._start(value)
        if start is None:
            parts = [user for user in value.users if user in reached]
            found = {part: self._start(part) for part in parts if _is_slice(part)}
            if len(found) == len(parts) and all(found.values()):
                self.values = self.values - {value} | set(parts)
                return dict(found)
            start = padded_start(self.program, self._run(value), value, self._name)
        return {value: start}

    def _start(self, value: fx.Node) -> fx.Node | None:
        every = self.strategy.every_stream
        return start_of(self.program, self._run(value), value, self._name, every)

    def _run(self, value: fx.Node) -> Region:
        block = block_of(block_call_of(value))
        return next(r for r in self.program.regions if block in r.blocks)


def _always(program: Program, cached: set[BlockId]) -> list[fx.Node]:
    """What runs on every step in any case: the output, and blocks that are never cached."""
    roots = [program.graph.output_node()]
    roots += [c for c in program.block_calls() if block_of(c) not in cached]
    if program.signal is not None:
        roots.append(program.signal)
    return roots


def _handed_over(program: Program) -> list[fx.Node]:
    """What the runs read that is made outside of them: of a U-shape, by a block of another run."""
    read: list[fx.Node] = []
    for region in program.regions[1:]:
        calls = [c for c in program.block_calls() if block_of(c) in region.blocks]
        members = descendants(calls) & ancestors(calls) | set(calls)
        read += [n for m in members for n in m.all_input_nodes if n not in members]
    return read


def _is_slice(node: fx.Node) -> bool:
    """A part of a joined stream (image rows of image and text) is a value of its own."""
    return node.target is torch.ops.aten.slice.Tensor
