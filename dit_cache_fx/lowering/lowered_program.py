"""A lowered graph with its program, strategy and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from dit_cache_fx.capture.recording import Recording
from dit_cache_fx.capture.timestep import tells_time
from dit_cache_fx.ir.nodes import operations, tensor_spec
from dit_cache_fx.ir.program import Program
from dit_cache_fx.lowering import Part, Variants
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(eq=False)
class Lowered:
    """A program after its passes, and its graphs for each kind of step."""

    program: Program
    variants: Variants
    nodes: int  # operations of the graph as captured
    block_bytes: dict[str, int]  # block -> bytes of its results
    serial: int
    strategy: Strategy  # with the processes that run the model
    #: whether each process has its own sample; None before the first call
    sample_apart: bool | None = field(default=None, init=False)

    def guards(self) -> list[str]:
        """The data that the graph depends on, in words; empty if Dynamo guards it."""
        return []

    def captured_graph(self) -> fx.GraphModule | None:
        """The graph before the passes, if it is kept."""
        return None

    @property
    def nodes_computed(self) -> int:
        """The number of nodes that a computed step executes."""
        return _nodes(self.variants.prefix, self.variants.compute)

    @property
    def nodes_reused(self) -> int:
        """The number of nodes that a reused step executes."""
        return _nodes(self.variants.prefix, self.variants.reuse)

    @property
    def takes(self) -> str:
        """The tensors that it was captured for, by name and shape."""
        nodes = self.program.graph.find_nodes(op="placeholder")
        given = [n for n in nodes if n.name not in self.program.owned]
        return ", ".join(f"{n.name}{list(n.meta['val'].shape)}" for n in given)

    def __str__(self) -> str:
        """Return a description of one line."""
        program = self.program
        lists = ", ".join(f"{name} ({n})" for name, n in program.block_lists.items())
        runs = "".join(f", run {r.index} leaves {' '.join(r.values)}" for r in program.regions)
        return (
            f"graph {self.serial} for {self.takes}: block lists {lists}, timestep "
            f"{program.timestep_input!r}{runs}; {self.nodes} nodes captured, "
            f"{self.nodes_computed} on a computed step, {self.nodes_reused} on a reused step"
        )

    @cached_property
    def places(self) -> dict[str, int]:
        """Return the index of each input among the call's tensors."""
        return {name: place for place, name in enumerate(self.program.inputs)}

    @cached_property
    def given(self) -> list[int]:
        """Return the indexes of the call's tensors that are not the model's own."""
        return [i for i, name in enumerate(self.program.inputs) if name not in self.program.owned]

    @cached_property
    def signature(self) -> frozenset[tuple[str, TensorSpec]]:
        """Return the name, shape, dtype and device of the call's own tensors.

        A timestep of no dimensions is left out: a number may be a constant of another graph.
        """
        names = [self.program.inputs[i] for i in self.given]
        specs = {name: tensor_spec(self.program.node(name)) for name in names}
        step = self.program.timestep_input
        return frozenset(s for s in specs.items() if s[0] != step or s[1].shape)

    @cached_property
    def sample(self) -> int | None:
        """Return the index of the noisy sample's tensor: the largest of its argument."""
        program = self.program
        found = [
            (tensor_spec(program.node(program.inputs[i])).nbytes, i)
            for i in self.given
            if program.sample is not None and program.arguments[i] == program.sample
        ]
        return max(found)[1] if found else None

    @cached_property
    def conditioning(self) -> list[int]:
        """Return the indexes of the call's conditioning tensors: no timestep, sample or weight.

        A model may take more than one timestep (both ends of a step) and more than one sample (a
        video and its sound), and gives as many back.
        """
        program = self.program
        step = program.timestep_argument
        times = {argument for argument in program.arguments if tells_time(argument, step)}
        moving = {program.sample, step, *program.beside, *times}
        return [i for i in self.given if program.arguments[i] not in moving]


def block_bytes(recording: Recording, blocks: Iterable[str]) -> dict[str, int]:
    """Return the bytes of all results of each of these blocks."""
    found = dict.fromkeys(blocks, 0)
    for call in recording.calls:
        if call.name in found:
            found[call.name] += sum(spec.nbytes for spec in call.specs)
    return found


def _nodes(*parts: Part | None) -> int:
    return sum(operations(part.gm.graph) for part in parts if part is not None)
