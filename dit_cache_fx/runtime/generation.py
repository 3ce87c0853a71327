"""Which step of which generation a call belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dit_cache_fx.strategies import Course
from dit_cache_fx.values.identity import Seen

#: most timesteps of a generation that are noted
MAX_VALUES = 4096


@dataclass(frozen=True)
class Moment:
    """A place in a generation.

    `value`: the timestep (or the explicit step index). `direction`: +1 or -1 once the value has
    moved, else 0. `index`: the step, counted from the generation's first. `explicit`: the index
    was given by `cur_timestep`.
    """

    value: float
    direction: int = 0
    index: int = 0
    explicit: bool = False

    def advanced(self, value: float, explicit: bool) -> Moment | None:
        """The moment of a call with this value; None where it starts another generation.

        The same value is the same step (another CFG branch). A value that moves on is the next
        step; one that moves back against the direction so far is a new generation. An explicit
        index moves upwards and may leave steps out.
        """
        if explicit != self.explicit:
            return None
        if value == self.value:
            return self
        direction = 1 if value > self.value else -1
        if explicit:
            steps = int(value - self.value)
            return Moment(value, 1, self.index + steps, True) if direction > 0 else None
        if self.direction not in (0, direction):
            return None
        return Moment(value, direction, self.index + 1)


@dataclass
class Generation:
    """A denoising loop under way; its branches and signatures share it.

    `course`: its steps, as far as they are known beforehand. `conditioning`: of its newest call.
    `values`: the timesteps of its steps so far; it ends where one was left out.
    """

    moment: Moment
    course: Course = field(default_factory=Course)
    conditioning: Seen = field(default_factory=lambda: Seen([]))
    values: list[float] = field(default_factory=list)

    def note(self, moment: Moment) -> None:
        """A call has succeeded there: learn its timestep, where it is the next step's."""
        following = moment.index == len(self.values) and not moment.explicit
        if following and len(self.values) < MAX_VALUES:
            self.values.append(moment.value)

    def takes(self, value: float, explicit: bool, conditioning: Seen) -> bool:
        """Whether a first call with this value and conditioning surely belongs to this generation.

        Before the value has moved any other one may be the next step's or a new generation's: it is
        the next step's where the call has conditioning tensors of the newest one.
        """
        unmoved = self.moment.direction == 0 and value != self.moment.value
        if unmoved and not self.conditioning.shared_with(conditioning):
            return False
        return self.moment.advanced(value, explicit) is not None


def timestep_value(timestep: torch.Tensor) -> float:
    """One number for a timestep tensor: its mean (in float64).

    A tensor with a value for each token moves as its mean does, whichever tokens move. Reading it
    waits for the device when the tensor is on one.
    """
    if timestep.numel() == 1:
        return float(timestep.item())
    return float(timestep.double().mean().item())
