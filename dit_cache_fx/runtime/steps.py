"""Which step of which generation a call belongs to, told from the timestep's value."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


def advance(now: Moment | None, value: float) -> tuple[Moment, bool]:
    """The moment of a call with this timestep, and whether it starts a generation.

    The same value is the same step (another CFG branch). A value that moves on is the next step;
    one that moves back against the direction so far is a new generation.
    """
    if now is None or now.explicit:
        return Moment(value), True
    if value == now.value:
        return now, False
    direction = 1 if value > now.value else -1
    if now.direction not in (0, direction):
        return Moment(value), True
    return Moment(value, direction, now.index + 1), False


def advance_to(now: Moment | None, step: int) -> tuple[Moment, bool]:
    """The same for an explicit step index, which counts from the generation's first."""
    if now is None or not now.explicit or step < now.value:
        return Moment(step, explicit=True), True
    index = now.index + step - int(now.value)
    return Moment(step, index=index, explicit=True), False


def timestep_value(timestep: torch.Tensor) -> float:
    """One number for a timestep tensor: its mean (in float64).

    A tensor with a value for each token moves as its mean does, whichever tokens move. Reading it
    waits for the device when the tensor is on one.
    """
    if timestep.numel() == 1:
        return float(timestep.item())
    return float(timestep.double().mean().item())
