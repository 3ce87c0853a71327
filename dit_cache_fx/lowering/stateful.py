"""A program as a pure function: state in, state out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from dit_cache_fx.errors import OptionError
from dit_cache_fx.ir.program import Program
from dit_cache_fx.lowering.clock import ClockState
from dit_cache_fx.lowering.graph_course import GraphCourse
from dit_cache_fx.lowering.one_graph import FLAG, lower_one_graph
from dit_cache_fx.lowering.variants import Variants
from dit_cache_fx.strategies import Course, Strategy
from dit_cache_fx.strategies.schedule import ListedSteps
from dit_cache_fx.values.tensor_spec import TensorSpec

State = dict[str, torch.Tensor]
#: their multiples have evenly spread fractions
_IRRATIONAL = (math.sqrt(5), math.sqrt(2))
#: schedules are written out up to this step; all later steps are computed
MOST_STEPS = 1000


class FixedSteps(NamedTuple):
    """A schedule as a list: the steps that are computed, and the one from which on all are."""

    computed: Sequence[int]
    until: float


def fixed_steps(
    strategy: Strategy, num_steps: int | None, timesteps: tuple[float, ...] | None = None
) -> FixedSteps:
    """Write out the schedule of a program that gets no number of steps or timesteps later.

    Raises `OptionError` if the schedule needs the number of steps and it is None.
    """
    plan = strategy.plan
    if plan is None or isinstance(plan, ListedSteps):
        return FixedSteps(sorted(strategy.no_cache_steps or ()), math.inf)
    if num_steps is None and plan.needs_num_steps:
        raise OptionError(
            "num_steps",
            None,
            f"{plan} places its steps by their number, which must be known here: pass num_steps "
            "(or timesteps), or set it on the cached model (cached.num_steps = 50)",
        )
    most, course = max(MOST_STEPS, num_steps or 0), strategy.course(num_steps, timesteps)
    return FixedSteps([s for s in range(most) if course.computes(s)], most)


class Stateful(nn.Module):
    """Answers a call from its tensors and the state of the call before.

    `forward(state, inputs)` returns the model's tensors and the new state. `state`: "clock"
    (float64 [7], on the CPU), the cached tensors, the state of the strategy's rule, whether that
    is "lost". It belongs to one branch of a generation: CFG in two calls per step takes two states.
    A state never answers for another branch: it has a "checksum" of the conditioning (float64 [2
    n], on the CPU, for the n inputs in `conditioning`), and a call with another one computes.
    `assertions` on the call's tensors replace the guards of the capture.
    """

    def __init__(
        self,
        program: Program,
        variants: Variants,
        strategy: Strategy,
        assertions: nn.Module | None,
        conditioning: Sequence[str],
        steps: FixedSteps,
        course: Course | None = None,
    ) -> None:
        super().__init__()
        self.steps: torch.Tensor
        self.conditioning = tuple(conditioning)
        one = lower_one_graph(program, variants, strategy, carry=True)
        self._one = one
        self.program = one.part.gm
        self.cached = variants.cached
        self.inputs = program.inputs
        self.timestep_input = str(program.timestep_input)
        self.guards = assertions
        computed = torch.tensor(steps.computed, dtype=torch.float64, device="cpu")
        self.register_buffer("steps", computed, persistent=False)
        self.until = steps.until
        course = course or strategy.course()
        needs_course = course.by_timestep or {"gap", "way"} & set(one.part.names)
        most = max(MOST_STEPS, course.num_steps or 0)
        self.course = GraphCourse(course, most) if needs_course else None

    def initial(self) -> State:
        """Return the state before the first call."""
        specs = {**self.cached, **self._remembered}
        zeros = {name: spec.zeros() for name, spec in specs.items()}
        clock = torch.zeros(len(ClockState._fields), dtype=torch.float64, device="cpu")
        checksums = torch.zeros(2 * len(self.conditioning), dtype=torch.float64, device="cpu")
        return {"clock": clock, "checksum": checksums, **zeros}

    @property
    def _remembered(self) -> dict[str, TensorSpec]:
        """Return the specs of the rule's state, if the strategy has a rule."""
        return {"lost": FLAG, **self._one.state} if self._one.asks else {}

    def forward(
        self, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], State]:
        if self.guards is not None:
            self.guards(*(inputs[name] for name in self.inputs))
        now = inputs[self.timestep_input].to("cpu", torch.float64).mean()
        seen = _checksum([inputs[name] for name in self.conditioning])
        clock = ClockState.unpack(state["clock"]).advanced(
            now, torch.eq(seen, state["checksum"]).all()
        )
        scheduled = torch.eq(self.steps, clock.step).any() | (clock.step >= self.until)
        forced = (clock.computed == 0) | (clock.step == 0) | scheduled
        fresh = clock.computed == 0
        flags = {"forced": forced, "fresh": fresh | state["lost"] if "lost" in state else fresh}
        times = self._times(clock)
        operands = self._one.operands({**inputs, **state, **flags, **times})
        results = list(self.program(*operands))
        outputs, rest = results[: self._one.outputs], results[self._one.outputs :]
        cached, decided = rest[: len(self.cached)], rest[len(self.cached) :]
        computes = decided[0] if decided else forced
        new = {"clock": clock.after(computes, times["distance"]).pack(), "checksum": seen}
        new.update(zip(self.cached, cached, strict=True))
        new.update(zip(self._remembered, decided[1:], strict=True))
        return outputs, new

    def _times(self, clock: ClockState) -> State:
        """Return the clock's tensors that the graph reads."""
        reach = torch.where(clock.computed > 1, clock.reach, 0.0)
        times = {"computed": clock.computed, "distance": clock.distance, "reach": reach}
        if self.course is None:
            return times
        return times | {
            "distance": self.course.distance(clock),
            "gap": self.course.gap(clock),
            "way": self.course.way(clock),
        }


def _checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return two weighted sums of each tensor, on the CPU, that depend on values and positions."""
    sums = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for tensor in tensors:
        values = tensor.to(torch.float64).flatten()
        places = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
        weighted = [(values * _weights(places, factor)).sum() for factor in _IRRATIONAL]
        sums.append(torch.stack(weighted).to("cpu"))
    return torch.cat(sums)


def _weights(places: torch.Tensor, factor: float) -> torch.Tensor:
    """Return distinct numbers from 1 to 2."""
    scaled = places * factor
    return 1 + scaled - scaled.floor()


class Carried(nn.Module):
    """A `Stateful` program that keeps its state in buffers, inside another graph.

    Each has at least one dimension: Dynamo drops changes of a float64 tensor without any.
    """

    def __init__(self, stateful: Stateful) -> None:
        super().__init__()
        self.stateful = stateful
        self.names = tuple(stateful.initial())
        for name, tensor in stateful.initial().items():
            self.register_buffer(f"state_{name}", torch.atleast_1d(tensor), persistent=False)
        self.shapes = {name: tensor.shape for name, tensor in stateful.initial().items()}

    def forget(self) -> None:
        """Reset the state to that before the first call."""
        for name, tensor in self.stateful.initial().items():
            getattr(self, f"state_{name}").copy_(tensor)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        held = {name: getattr(self, f"state_{name}") for name in self.names}
        state = {name: tensor.reshape(self.shapes[name]) for name, tensor in held.items()}
        outputs: list[torch.Tensor]
        outputs, new = self.stateful(state, inputs)
        for name, tensor in new.items():
            held[name].copy_(torch.atleast_1d(tensor.detach()))
        return outputs
