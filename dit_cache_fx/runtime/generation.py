"""Which step of which generation a call belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch

from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.timestep_value import (
    TimestepValue,
    as_number,
    distance,
    movement,
    number_of,
)
from dit_cache_fx.strategies import Course
from dit_cache_fx.strategies.timesteps import Timesteps

#: a timestep that moves this many times as far as ever before in a generation is in doubt ...
DOUBTFUL_MOVE = 1.75
#: ... and from here on it is likely to be of another one
FAR_MOVE = 4.0
#: most timesteps of a generation that are noted
MAX_VALUES = 4096


class Jump(IntEnum):
    """How far a timestep moves, beside all moves of its generation so far."""

    NONE = 0
    DOUBTFUL = 1
    FAR = 2


def way_of(before: TimestepValue, now: TimestepValue, direction: int, explicit: bool) -> int | None:
    """0 for the same value, +1 or -1 for one that moves on; None where it does not.

    A timestep moves on where no element moves against the `direction` so far. An `explicit` index
    moves upwards.
    """
    low, high = movement(before, now)
    if low == high == 0:
        return 0
    way = 1 if low >= 0 else -1 if high <= 0 else 0
    allowed = (1,) if explicit else (direction,) if direction else (1, -1)
    return way if way in allowed else None


@dataclass
class StepPosition:
    """A place in a generation; never changed.

    `value`: the timestep (or the explicit step index). `direction`: +1 or -1 once the value has
    moved, else 0. `index`: the step, counted from the generation's first. `explicit`: the index
    was given by `cur_timestep`.
    """

    value: TimestepValue
    direction: int = 0
    index: int = 0
    explicit: bool = False

    def moved(self, value: TimestepValue, explicit: bool) -> int | None:
        """What `way_of` says of a call with this value."""
        if explicit != self.explicit:
            return None
        return way_of(self.value, value, self.direction, explicit)

    def next(self, value: TimestepValue, way: int) -> StepPosition:
        """The step behind this one. Explicit indexes may leave steps out."""
        steps = 1
        if self.explicit:
            steps = round(as_number(value) - as_number(self.value))
        return StepPosition(value, way or self.direction, self.index + steps, self.explicit)


@dataclass(eq=False)
class Generation:
    """A denoising loop under way; the branches and signatures of a request share it.

    `called`: the branches that were called in its newest step, by their identity. `course`: its
    steps, as far as they are known beforehand. `values`: the timesteps of its steps so far; it ends
    where one was left out. `entered`: its steps that had a call. `told`: the number of steps as the
    user says it, else None. `move`: the farthest that the timestep has moved. `repeats`: how often
    its first call came before. `crowded`: it has more branches than are known. `origin`: the
    generation that it has parted from.
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
        """One that begins with a call at this position. `timesteps`: those of its request alone."""
        value = None if position.explicit else position.value
        course = count.course(value, timesteps)
        return Generation(position, course, count.told_steps(course, own=timesteps is not None))

    def number(self, value: TimestepValue) -> float:
        """A timestep of this generation as one number."""
        return number_of(value, None if self.course.learnt else self.course.timesteps)

    def apart(self, position: StepPosition, branch: object) -> Generation:
        """One for a branch that others have left behind at this position."""
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
        """Where a call of `branch` with this timestep stands; None where it is not of this one.

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
        """Whether it has no such step: the user said how many there are."""
        return self.told is not None and position.index >= self.told and not position.explicit

    def jump(self, value: TimestepValue) -> Jump:
        """Whether a step with this timestep moves out of proportion, rounding left out."""
        if self.position.explicit or self._expects(value):
            return Jump.NONE
        move = distance(self.position.value, value)
        if self.move == 0 or move <= DOUBTFUL_MOVE * self.move:
            return Jump.NONE
        slack = 2 * _rounding(as_number(value))
        far, doubtful = (move > times * self.move + slack for times in (FAR_MOVE, DOUBTFUL_MOVE))
        return Jump.FAR if far else Jump.DOUBTFUL if doubtful else Jump.NONE

    def is_rounded(self, value: TimestepValue) -> bool:
        """Whether a timestep moves by no more than timesteps of this size may be rounded by."""
        move = distance(self.position.value, value)
        return move <= 2 * _rounding(as_number(self.position.value))

    def _expects(self, value: TimestepValue) -> bool:
        """Whether its next step is known to have this timestep."""
        timesteps, following = self.course.timesteps, self.position.index + 1
        known = timesteps is not None and following < len(timesteps)
        return known and timesteps[following] == self.number(value)  # type: ignore[index]

    def enter(self, position: StepPosition, branch: object) -> None:
        """Move to a call of `branch`; its timestep is learnt where it is the next step's."""
        if position is not self.position:
            self.move = max(self.move, distance(self.position.value, position.value))
            self.position, self.called, self.repeats = position, set(), 0
        self.called.add(branch)
        self.entered.add(position.index)
        following = position.index == len(self.values) and not position.explicit
        if following and len(self.values) < MAX_VALUES:
            self.values.append(self.number(position.value))


def _rounding(value: float) -> float:
    """How coarse timesteps of this size may be: those of a format that holds the value exactly."""
    number = torch.tensor(value, dtype=torch.float64, device="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        if float(number.to(dtype)) == value:
            return torch.finfo(dtype).eps * abs(value)
    return 0.0
