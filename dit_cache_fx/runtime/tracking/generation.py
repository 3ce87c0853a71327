"""Determine the step and the generation of a call from its timestep."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.runtime.tracking.timestep_value import (
    TimestepValue,
    as_number,
    distance,
    number_of,
    rounding,
    way_of,
)
from dit_cache_fx.strategies import Course
from dit_cache_fx.strategies.timesteps import Timesteps

#: a timestep that moves this many times as far as ever before in a generation is in doubt ...
DOUBTFUL_MOVE = 1.75
#: ... and from here on it probably belongs to another one
FAR_MOVE = 4.0
#: the largest number of timesteps that a generation records
MAX_VALUES = 4096


class Jump(IntEnum):
    """The size of a timestep's move, compared with all moves of its generation so far."""

    NONE = 0
    DOUBTFUL = 1
    FAR = 2


@dataclass(slots=True)
class StepPosition:
    """An immutable position in a generation.

    `value`: the timestep (or the explicit step index). `direction`: +1 or -1 after the first move,
    before it 0. `index`: the step, counted from the generation's first. `explicit`: `cur_timestep`
    gave the index.
    """

    value: TimestepValue
    direction: int = 0
    index: int = 0
    explicit: bool = False

    def moved(self, value: TimestepValue, explicit: bool) -> int | None:
        """Return `way_of` for a call with this value."""
        if explicit != self.explicit:
            return None
        return way_of(self.value, value, self.direction, explicit)

    def next(self, value: TimestepValue, way: int) -> StepPosition:
        """Return the next step. Explicit indexes may leave steps out."""
        steps = 1
        if self.explicit:
            steps = round(as_number(value) - as_number(self.value))
        return StepPosition(value, way or self.direction, self.index + steps, self.explicit)


@dataclass(eq=False)
class Generation:
    """A denoising loop under way; the branches and signatures of a request share it.

    `called`: the branches that were called in its newest step, by their identity. `course`: its
    steps, as far as they are known in advance. `values`: the timesteps of its steps so far; it ends
    at the first gap. `entered`: the number of its steps with a call. `told`: the number of steps
    that the user gave, or None. `move`: the largest move of the timestep. `repeats`: how many times
    its first call was repeated. `crowded`: it has more branches than are known. `origin`: the
    generation from which it split.
    """

    position: StepPosition = field(default_factory=lambda: StepPosition(0.0))
    course: Course = field(default_factory=Course)
    told: int | None = None
    called: set[object] = field(default_factory=set)
    values: list[float] = field(default_factory=list)
    entered: set[int] = field(default_factory=set)
    move: float = 0.0
    repeats: int = 0
    crowded: bool = False
    origin: Generation | None = None

    @staticmethod
    def begun(
        position: StepPosition, count: StepCount, timesteps: Timesteps | None = None
    ) -> Generation:
        """Begin a generation with a call at this position. `timesteps`: those of its request."""
        value = None if position.explicit else position.value
        course = count.course(value, timesteps)
        return Generation(position, course, count.told_steps(course, own=timesteps is not None))

    def number(self, value: TimestepValue) -> float:
        """Return a timestep of this generation as one number."""
        return number_of(value, None if self.course.learnt else self.course.timesteps)

    def apart(self, position: StepPosition, branch: object) -> Generation:
        """Split off a generation for a branch that the others have left behind at this position."""
        own = self.values[: position.index + 1]
        return Generation(
            position,
            self.course,
            self.told,
            {branch},
            own,
            set(self.entered),
            self.move,
            origin=self,
        )

    def reached(self, value: TimestepValue, explicit: bool, branch: object) -> StepPosition | None:
        """Return the position of a call of `branch` with this timestep; None if it has none here.

        The same value from another branch is the same step, from the same branch the next one
        (timesteps that round to one value, samplers that evaluate one twice).
        """
        way = self.position.moved(value, explicit)
        if way is None:
            return None
        if way == 0 and (explicit or branch not in self.called):
            return self.position
        return self.position.next(value, way)

    def over(self, position: StepPosition) -> bool:
        """Return whether the position is past the number of steps that the user gave."""
        return self.told is not None and position.index >= self.told and not position.explicit

    def jump(self, value: TimestepValue) -> Jump:
        """Return whether a step with this timestep moves out of proportion, apart from rounding."""
        move = distance(self.position.value, value)
        if self.move == 0 or move <= DOUBTFUL_MOVE * self.move:
            return Jump.NONE
        if self.position.explicit or self._expects(value):
            return Jump.NONE
        slack = 2 * rounding(as_number(value))
        far, doubtful = (move > times * self.move + slack for times in (FAR_MOVE, DOUBTFUL_MOVE))
        return Jump.FAR if far else Jump.DOUBTFUL if doubtful else Jump.NONE

    def is_rounded(self, value: TimestepValue) -> bool:
        """Return whether a timestep moves by no more than the rounding error of its size."""
        move = distance(self.position.value, value)
        return move <= 2 * rounding(as_number(self.position.value))

    def _expects(self, value: TimestepValue) -> bool:
        """Return whether the next step is known to have this timestep."""
        timesteps, following = self.course.timesteps, self.position.index + 1
        known = timesteps is not None and following < len(timesteps)
        return known and timesteps[following] == self.number(value)  # type: ignore[index]

    def enter(self, position: StepPosition, branch: object) -> None:
        """Move to a call of `branch`; record its timestep if it is the next step's."""
        if position is not self.position:
            self.move = max(self.move, distance(self.position.value, position.value))
            self.position, self.called, self.repeats = position, set(), 0
        self.called.add(branch)
        self.entered.add(position.index)
        following = position.index == len(self.values) and not position.explicit
        if following and len(self.values) < MAX_VALUES:
            self.values.append(self.number(position.value))
