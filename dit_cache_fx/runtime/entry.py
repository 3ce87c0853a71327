"""A captured graph in every form in which it runs, and its key."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import fx

from dit_cache_fx._torch import constant_result, not_a_compiled_frame
from dit_cache_fx.capture import Captured, FlatCall
from dit_cache_fx.capture.ambient import Ambient
from dit_cache_fx.capture.fingerprint import Fingerprint
from dit_cache_fx.ir.node_meta import is_block
from dit_cache_fx.ir.program import Program
from dit_cache_fx.lowering import (
    OneGraph,
    SplitPart,
    Variants,
    lower_one_graph,
    lower_variants,
    split_variants,
)
from dit_cache_fx.lowering.asserts import assertions
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.lowering.stateful import Carried, Stateful, fixed_steps
from dit_cache_fx.passes import run_passes
from dit_cache_fx.runtime.batch.row_steps import RowLayout
from dit_cache_fx.runtime.first_runs import FirstRuns
from dit_cache_fx.runtime.tracking.hooks import Hooks
from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.values.pytree import Skeleton


class Signature(NamedTuple):
    """The signature of a call. `numbers`: those of all processes, if each has calls of its own."""

    call: Hashable
    numbers: tuple[int, ...] = ()


#: calls with equal keys run the same graph
InputKey = tuple[Signature, Ambient]


class RowsKey(NamedTuple):
    """The key of a group of rows. `one`: the number of the graph for a single row."""

    call: InputKey
    one: int


GraphKey = InputKey | RowsKey


def input_key(call: FlatCall, numbers: tuple[int, ...] = ()) -> InputKey:
    """Return the key of a call's graphs: its signature and torch's own state."""
    return Signature(call.key, numbers), Ambient.now()


@dataclass(eq=False)
class Entry(Lowered):
    """A captured and lowered graph."""

    captured: Captured
    fingerprint: Fingerprint
    volatile: frozenset[tuple[str, str]]  # parts that the forward changes by itself
    count: StepCount
    skeleton: Skeleton  # of the call that it was captured from
    hooks: Hooks
    untouched: Program | None = None  # before the passes, if other strategies need it
    breaks: bool = False  # its blocks cannot be compiled as one graph
    apart: bool = False  # compiled as one graph for each kind of step
    carried: dict[tuple[str, ...], Carried] = field(default_factory=dict)  # by cache context
    layout: RowLayout | None = None  # of its rows, if each is at its own step
    served: set[float] = field(default_factory=set)  # some of the timesteps that it answered
    first_runs: FirstRuns = field(default_factory=FirstRuns)  # with each compiler
    _lowering: threading.RLock = field(default_factory=threading.RLock)
    _one_graph: OneGraph | None = None
    _compiled_steps: Variants | None = None
    key: GraphKey | None = None  # one object for all its calls: cheap to compare

    def lowered_for(self, strategy: Strategy, count: StepCount) -> Entry:
        """Lower the same capture for another strategy that reads the same values of the model."""
        assert self.untouched is not None
        program = self.untouched.copied()
        run_passes(program, strategy)
        return Entry(
            program,
            lower_variants(program),
            self.nodes,
            self.block_bytes,
            self.serial,
            strategy,
            replace(self.captured, program=program),
            self.fingerprint,
            self.volatile,
            count,
            self.skeleton,
            self.hooks,
        )

    def guards(self) -> list[str]:
        guards = self.captured.guards
        return [] if guards is None else guards.described(guards.expected)

    def captured_graph(self) -> fx.GraphModule:
        return self.captured.gm

    @property
    def one_graph(self) -> OneGraph:
        """The graph that contains the decision."""
        with self._lowering:
            if self._one_graph is None:
                self._one_graph = lower_one_graph(self.program, self.variants, self.strategy)
            return self._one_graph

    @property
    def compiled_steps(self) -> Variants:
        """The graphs of each kind of step, for a compiler."""
        with self._lowering:
            if self._compiled_steps is None:
                self._compiled_steps = split_variants(self.variants)
            return self._compiled_steps

    @cached_property
    def rule_runs_blocks(self) -> bool:
        """Whether blocks run for the strategy's rule."""
        prefix = self.variants.prefix
        return prefix is not None and any(map(is_block, prefix.gm.graph.nodes))

    def broken(self) -> None:
        """Note that its blocks cannot be in one graph: the compiler gets each of them by itself."""
        self.breaks = True
        not_a_compiled_frame(self.variants.compute.run)

    def inputs(self, call: FlatCall) -> dict[str, torch.Tensor]:
        """Return the tensors of a call by the names of the graphs' inputs."""
        return dict(zip(self.program.inputs, call.tensors, strict=True))

    def stateful(self, check_conditioning: bool = True) -> Stateful:
        """Return the program with its clock, as a function of its state."""
        names = [self.program.inputs[i] for i in self.conditioning] if check_conditioning else []
        guards, accepted = self.captured.guards, self.captured.accepted.copy()
        asserted = None if guards is None else assertions(guards, accepted)
        course = self.count.lasting_course()
        steps = fixed_steps(self.strategy, course.num_steps, course.timesteps)
        return Stateful(self.program, self.variants, self.strategy, asserted, names, steps, course)

    def carried_in(self, context: tuple[str, ...]) -> Carried:
        """Return the program with the state of a cache context in its buffers."""
        return getattr(self, self._carry(context))  # type: ignore[no-any-return]

    @constant_result
    def sized_by_data(self) -> bool:
        """Return whether a size in its graphs depends on data."""
        steps = self.compiled_steps
        return any(isinstance(p, SplitPart) for p in (steps.compute, steps.reuse, steps.prefix))

    @constant_result
    def _carry(self, context: tuple[str, ...]) -> str:
        """Return the name of that program's attribute; create it, if necessary while tracing."""
        with self._lowering:
            if context not in self.carried:
                self.carried[context] = Carried(self.stateful())
            name = f"_carried_{[*self.carried].index(context)}"
            setattr(self, name, self.carried[context])
            return name


@dataclass(frozen=True)
class RowsOf:
    """The rows of a graph: `count` calls that the graph `one` answers by themselves."""

    one: Entry
    count: int
