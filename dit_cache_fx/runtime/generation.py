"""Which step of which generation a call belongs to, and how many steps a generation has."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dit_cache_fx.strategies import NumSteps
from dit_cache_fx.strategies.schedule import check_num_steps

#: a timestep as a number; where its elements differ, all of them: float64 [n] on the CPU
TimestepValue = float | torch.Tensor


def timestep_value(timestep: torch.Tensor) -> TimestepValue:
    """The values of a timestep tensor. Waits for the device when the tensor is on one."""
    if timestep.numel() == 1:
        return float(timestep.item())
    values = timestep.detach().to("cpu", torch.float64).flatten()
    return float(values[0]) if bool((values == values[0]).all()) else values


def as_number(value: TimestepValue) -> float:
    """One number for reports: the mean."""
    return value if isinstance(value, float) else float(value.mean())


def movement(before: TimestepValue, now: TimestepValue) -> tuple[float, float]:
    """How far the elements of a timestep moved at least and at most, with signs.

    Timesteps of different lengths move as their means do.
    """
    if isinstance(before, float) and isinstance(now, float):
        return now - before, now - before
    a, b = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (before, now))
    if 1 not in (a.numel(), b.numel()) and a.numel() != b.numel():
        return movement(as_number(before), as_number(now))
    low, high = torch.aminmax(b - a)
    return float(low), float(high)


@dataclass(frozen=True)
class StepPosition:
    """A place in a generation.

    `value`: the timestep (or the explicit step index). `direction`: +1 or -1 once the value has
    moved, else 0. `index`: the step, counted from the generation's first. `explicit`: the index
    was given by `cur_timestep`.
    """

    value: TimestepValue
    direction: int = 0
    index: int = 0
    explicit: bool = False

    def moved(self, value: TimestepValue, explicit: bool) -> int | None:
        """0 for the same value, +1 or -1 for one that moves on; None where it does not.

        A timestep moves on where no element moves against the direction so far. An explicit index
        moves upwards.
        """
        if explicit != self.explicit:
            return None
        low, high = movement(self.value, value)
        if low == high == 0:
            return 0
        way = 1 if low >= 0 else -1 if high <= 0 else 0
        allowed = (1,) if explicit else (self.direction,) if self.direction else (1, -1)
        return way if way in allowed else None

    def next(self, value: TimestepValue, way: int) -> StepPosition:
        """The step behind this one. Explicit indexes may leave steps out."""
        steps = 1
        if self.explicit:
            steps = round(as_number(value) - as_number(self.value))
        return StepPosition(value, way or self.direction, self.index + steps, self.explicit)


@dataclass(eq=False)
class Generation:
    """A denoising loop under way; the branches and signatures of a request share it.

    `called`: the branches that were called in its newest step, by their identity. `num_steps`: how
    many steps it is expected to have; `told`: as the user says it. None where that is not known.
    `crowded`: it has more branches than are known. `origin`: the generation that it has parted
    from.
    """

    position: StepPosition = field(default_factory=lambda: StepPosition(0.0))
    num_steps: int | None = None
    told: int | None = None
    called: set[object] = field(default_factory=set)
    crowded: bool = False
    origin: Generation | None = None

    @staticmethod
    def begun(position: StepPosition, count: StepCount) -> Generation:
        """One that begins with a call at this position."""
        told = count.told()
        return Generation(position, count.counted if told is None else told, told)

    def apart(self, position: StepPosition, branch: object) -> Generation:
        """One for a branch that others have left behind at this position."""
        return Generation(position, self.num_steps, self.told, {branch}, origin=self)

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

    def enter(self, position: StepPosition, branch: object) -> None:
        """Move to a call of `branch`."""
        if position is not self.position:
            self.position, self.called = position, set()
        self.called.add(branch)


class StepCount:
    """The number of steps: as set on the cached model, else as the option says, else as counted.

    `given`: what is set on the cached model. `counted`: the steps of the newest generation that has
    ended (one that was broken off counts as it ended).
    """

    def __init__(self, option: NumSteps | None) -> None:
        self.option = option
        self.given: int | None = None
        self.counted: int | None = None

    def told(self) -> int | None:
        """As the user says it. Raises `OptionError` where the option's function gives no number."""
        if self.given is not None or not callable(self.option):
            return self.option if self.given is None else self.given  # type: ignore[return-value]
        number = self.option()
        check_num_steps(number, "num_steps()")
        return number

    def ended(self, generation: Generation | None) -> None:
        """A generation has ended."""
        if generation is not None:
            self.counted = generation.position.index + 1
