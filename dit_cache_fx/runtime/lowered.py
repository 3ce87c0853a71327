"""A graph that is ready to answer calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dit_cache_fx.lowering import Variants
from dit_cache_fx.program import Program


@dataclass(eq=False)
class Lowered:
    """A program that went through the passes, and its graphs for each kind of step."""

    program: Program
    variants: Variants
    nodes: int  # operations of the graph as captured
    block_bytes: dict[str, int]  # block -> bytes of its results
    serial: int

    @cached_property
    def timestep(self) -> int | None:
        """Which of the call's tensors tells the step."""
        name = self.program.timestep
        return None if name is None else self.program.inputs.index(name)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each input is among the call's tensors."""
        return {name: place for place, name in enumerate(self.program.inputs)}

    @cached_property
    def given(self) -> list[int]:
        """Which of the call's tensors are not the model's own."""
        return [i for i, name in enumerate(self.program.inputs) if name not in self.program.owned]

    @cached_property
    def conditioning(self) -> list[int]:
        """Which of the call's tensors are neither the timestep's, the sample's nor the model's."""
        program = self.program
        moving = {program.sample}
        if self.timestep is not None:
            moving.add(program.arguments[self.timestep])
        return [i for i in self.given if program.arguments[i] not in moving]
