"""Timestep values: one number or one per element, and the size and direction of their moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_cache_fx.strategies.timesteps import told_of
from dit_cache_fx.values.wrapped import whole

#: a timestep as a number; if its elements differ, all of them: float64 [n] on the CPU
TimestepValue = float | torch.Tensor


def timestep_value(timestep: torch.Tensor) -> TimestepValue:
    """Return the values of a timestep tensor. Waits for the device if the tensor is on one."""
    timestep = whole(timestep)
    if timestep.numel() == 1:
        return float(timestep.item())
    values = timestep.detach().to("cpu", torch.float64).flatten()
    return float(values[0]) if bool((values == values[0]).all()) else values


def as_number(value: TimestepValue) -> float:
    """Return one number for reports: the mean."""
    return value if isinstance(value, float) else float(value.mean())


def number_of(value: TimestepValue, told: Sequence[float] | None) -> float:
    """Return a timestep as one number: of elements that differ, the one among the `told` timesteps.

    Tokens that are given stand elsewhere than those that the sampler moves; one kind is farthest
    up, the other farthest down. If nothing tells which is which, return the mean.
    """
    if isinstance(value, float):
        return value
    ends = [float(end) for end in torch.aminmax(value)]
    known = None if told is None else told_of(told, ends)
    return as_number(value) if known is None else known


def movement(before: TimestepValue, now: TimestepValue) -> tuple[float, float]:
    """Return the smallest and the largest move of a timestep's elements, with signs.

    Timesteps of different lengths move as their means do.
    """
    if isinstance(before, float) and isinstance(now, float):
        return now - before, now - before
    a, b = (
        torch.as_tensor(v, dtype=torch.float64, device="cpu").reshape(-1) for v in (before, now)
    )
    if 1 not in (a.numel(), b.numel()) and a.numel() != b.numel():
        return movement(as_number(before), as_number(now))
    low, high = torch.aminmax(b - a)
    return float(low), float(high)


def distance(before: TimestepValue, now: TimestepValue) -> float:
    """Return the distance that a timestep's farthest element moved."""
    if isinstance(before, float) and isinstance(now, float):
        return abs(now - before)
    return max(map(abs, movement(before, now)))


def way_of(before: TimestepValue, now: TimestepValue, direction: int, explicit: bool) -> int | None:
    """Return 0 for the same value, +1 or -1 for one that moves on, None otherwise.

    A timestep moves on if no element moves against the `direction` so far. An `explicit` index
    moves upwards.
    """
    low, high = movement(before, now)
    if low == high == 0:
        return 0
    way = 1 if low >= 0 else -1 if high <= 0 else 0
    allowed = (1,) if explicit else (direction,) if direction else (1, -1)
    return way if way in allowed else None


def rounding(value: float) -> float:
    """Return the rounding error of a timestep, from the formats that represent it exactly."""
    number = torch.tensor(value, dtype=torch.float64, device="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        if float(number.to(dtype)) == value:
            return torch.finfo(dtype).eps * abs(value)
    return 0.0
