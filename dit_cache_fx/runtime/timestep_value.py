"""The timestep of a call, as one number or as one for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_cache_fx.strategies.timesteps import told_of
from dit_cache_fx.values.wrapped import whole

#: a timestep as a number; where its elements differ, all of them: float64 [n] on the CPU
TimestepValue = float | torch.Tensor


def timestep_value(timestep: torch.Tensor) -> TimestepValue:
    """The values of a timestep tensor. Waits for the device when the tensor is on one."""
    timestep = whole(timestep)
    if timestep.numel() == 1:
        return float(timestep.item())
    values = timestep.detach().to("cpu", torch.float64).flatten()
    return float(values[0]) if bool((values == values[0]).all()) else values


def as_number(value: TimestepValue) -> float:
    """One number for reports: the mean."""
    return value if isinstance(value, float) else float(value.mean())


def number_of(value: TimestepValue, told: Sequence[float] | None) -> float:
    """A timestep as one number: the sampler's, where its elements differ and its own are `told`.

    Tokens that are given stand elsewhere than those that the sampler moves; one of both is farthest
    up, the other farthest down. Where nothing tells which, it is the mean.
    """
    if isinstance(value, float):
        return value
    ends = [float(end) for end in torch.aminmax(value)]
    known = None if told is None else told_of(told, ends)
    return as_number(value) if known is None else known


def movement(before: TimestepValue, now: TimestepValue) -> tuple[float, float]:
    """How far the elements of a timestep moved at least and at most, with signs.

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
    """How far the farthest element of a timestep moved."""
    if isinstance(before, float) and isinstance(now, float):
        return abs(now - before)
    return max(map(abs, movement(before, now)))
