"""Which step of which generation a call belongs to, and how many steps a generation has."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dit_cache_fx.strategies import NumSteps
from dit_cache_fx.strategies.schedule import check_num_steps
from dit_cache_fx.values.identity import Seen


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

    `num_steps`: how many it is expected to have; None where that is not known. `conditioning`: of
    its newest call.
    """

    moment: Moment
    num_steps: int | None = None
    conditioning: Seen = field(default_factory=lambda: Seen([]))

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

    def expected(self) -> int | None:
        """For a generation that begins now; None where nothing is known."""
        told = self.told()
        return self.counted if told is None else told
