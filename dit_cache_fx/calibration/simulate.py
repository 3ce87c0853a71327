"""Simulate a predictor on a recorded generation, without the model.

The predictors are linear in the computed values, so a strategy's own functions run on unit vectors:
the result for a step are the factors of the computed values in its prediction. Many schedules run
at once, one in each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_cache_fx.calibration.record import Trajectory
from dit_cache_fx.strategies import Clock, Course, Strategy
from dit_cache_fx.strategies.clock import MOMENTS

#: the weight of the errors on the way, relative to that at the end: the model's next outputs depend
#: on the sample at that time
WAY = 1.0
_FLOOR = 1e-30


@dataclass(frozen=True)
class Recorded:
    """The recorded generations of all runs together, and the positions of their steps.

    `values` (float64 [steps, samples, rank]) and `weights` (float64 [steps]) as in `Trajectory`.
    """

    timesteps: tuple[float, ...]
    values: Tensor
    weights: Tensor

    @staticmethod
    def of(
        timesteps: tuple[float, ...], trajectories: Sequence[Trajectory], most: int
    ) -> Recorded | None:
        """Return at most `most` samples of them, from as many runs as possible, or None."""
        fitting = [t for t in trajectories if t.values.shape[2] == len(timesteps)]
        if not fitting:
            return None
        each = -(-most // len(fitting))
        samples = [s for t in fitting for s in t.values[:each]][:most]
        rank = max(s.shape[0] for s in samples)
        padded = torch.zeros(len(timesteps), len(samples), rank, dtype=torch.float64)
        for i, sample in enumerate(samples):
            padded[:, i, : sample.shape[0]] = sample.T
        weights = torch.stack([t.weights for t in fitting]).mean(0)
        return Recorded(timesteps, padded, weights)

    def score(self, strategy: Strategy, masks: Tensor) -> Tensor:
        """Score each schedule by its expected error, in dB of an unknown unit: [rows].

        `masks` (bool [rows, steps]): the computed steps.
        """
        steps = len(self.timesteps)
        wrong = factors(strategy, self.timesteps, masks) - torch.eye(steps, dtype=torch.float64)
        summed = (wrong * self.weights[:, None]).cumsum(1)  # errors of the sample at each step
        flat = self.values.flatten(1)
        errors = (summed @ flat).unflatten(2, self.values.shape[1:]).square().sum(3)
        share = self.weights.abs() / self.weights.abs().sum().clamp(min=_FLOOR)
        way = torch.einsum("bks,k->bs", errors, share)
        return -10 * torch.log10((errors[:, -1] + WAY * way).clamp(min=_FLOOR)).mean(1)


def factors(strategy: Strategy, timesteps: tuple[float, ...], masks: Tensor) -> Tensor:
    """Return [rows, steps, steps]: row k of a schedule has the factors of its output on step k."""
    course = strategy.course(len(timesteps), timesteps)
    rows, steps = masks.shape
    clock, one = _Clocks(course, masks), torch.eye(steps, dtype=torch.float64)
    cached = [torch.zeros(rows, steps, dtype=torch.float64)] * strategy.slots()
    found = []
    for step in range(steps):
        computes, now = masks[:, step, None], clock.at(step)
        value = one[step].expand(rows, steps)
        found.append(torch.where(computes, value, strategy.reuse(cached, None, now)))
        if bool(computes.any()):
            new = strategy.store(cached, value, None, now)
            cached = [torch.where(computes, a, b) for a, b in zip(new, cached, strict=True)]
        clock.advance(step)
    return torch.stack(found, 1)


class _Clocks:
    """The clock of each schedule: as in `Course` and `Step`, for many rows."""

    def __init__(self, course: Course, masks: Tensor) -> None:
        rows, steps = masks.shape
        places = torch.arange(steps).expand(rows, steps)
        positions = [course.position(step) for step in range(steps + 1)]
        self._masks = masks
        self._fading = course.fading
        self._lengths = torch.tensor(positions, dtype=torch.float64).diff()
        axis = positions if course.by_timestep else range(steps + 1)
        self._axis = torch.tensor([float(place) for place in axis], dtype=torch.float64)
        behind = torch.where(masks, places, steps).flip(1).cummin(1).values.flip(1)
        self._next = torch.cat([behind, torch.full((rows, 1), steps)], dim=1)
        self._last = torch.zeros(rows, dtype=torch.long)
        self._computed = torch.zeros(rows, 1, dtype=torch.float64)
        self._reach = torch.zeros(rows, 1, dtype=torch.float64)
        self._sums = torch.zeros(MOMENTS, rows, 1, dtype=torch.float64)
        ends = torch.zeros(1, dtype=torch.float64)
        self._passed = torch.cat([ends, self._lengths.cumsum(0)])

    def at(self, step: int) -> Clock:
        following = self._passed[self._next[:, step + 1]]
        ahead = (following - self._passed[step + 1])[:, None]
        gap = torch.where(ahead != 0, self._sums / torch.where(ahead != 0, ahead, 1.0), 0.0)
        if self._fading:
            coming = following - self._passed[step]
            left = float(self._passed[-1] - self._passed[step]) or torch.inf
            gap = gap * (1 - coming / left).clamp(0, 1)[:, None]
        reach = torch.where(self._computed > 1, self._reach, 0.0)
        return Clock(self._distance(step), self._computed, gap, reach, torch.zeros(2))  # no rule

    def advance(self, step: int) -> None:
        computes, distance = self._masks[:, step, None], self._distance(step)
        moments = torch.stack([distance**i for i in range(MOMENTS)]) * self._lengths[step]
        self._sums = torch.where(computes, 0.0, self._sums + moments)
        self._reach = torch.where(computes, distance, self._reach)
        self._computed = self._computed + computes
        self._last = torch.where(computes[:, 0], step, self._last)

    def _distance(self, step: int) -> Tensor:
        return (self._axis[step] - self._axis[self._last])[:, None]
