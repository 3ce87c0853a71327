"""The steps of a generation as numbers inside a graph."""

from __future__ import annotations

import math

import torch
from torch import nn

from dit_cache_fx.lowering.clock import ClockState
from dit_cache_fx.strategies import Course
from dit_cache_fx.strategies.clock import MOMENTS


class GraphCourse(nn.Module):
    """A `Course` as constants of a graph: gives the tensors of a `Clock` for a step.

    `steps`: the number of steps that are written out; later ones count as the last of them.
    """

    def __init__(self, course: Course, steps: int) -> None:
        super().__init__()
        self.positions: torch.Tensor
        self.ahead: torch.Tensor
        self.coming: torch.Tensor
        self.left: torch.Tensor
        self.powers: torch.Tensor
        self.by_timestep, self.whole = course.by_timestep, course.whole
        self._keep("positions", [course.position(step) for step in range(steps + 1)])
        self._keep("ahead", [_or_nan(course.ahead(step)) for step in range(steps)])
        self._keep("coming", [_or_nan(course.coming(step)) for step in range(steps)])
        self._keep("left", [course.left(step) for step in range(steps)])
        self._keep("powers", [*range(MOMENTS)])

    def _keep(self, name: str, numbers: list[float]) -> None:
        self.register_buffer(name, torch.tensor(numbers, dtype=torch.float64), persistent=False)

    def distance(self, clock: ClockState) -> torch.Tensor:
        """`Clock.distance`; 0 before the first computed step."""
        if not self.by_timestep:
            return clock.distance
        moved = _at(self.positions, clock.step) - _at(self.positions, clock.last)
        return torch.where(clock.computed > 0, moved, 0.0)

    def gap(self, clock: ClockState) -> torch.Tensor:
        """`Clock.gap`."""
        steps = torch.arange(len(self.ahead), dtype=torch.float64)
        past = (steps > clock.last) & (steps < clock.step) & (clock.computed > 0)
        last = _at(self.positions, clock.last) if self.by_timestep else clock.last
        distances = (self.positions[:-1] if self.by_timestep else steps) - last
        weighted = torch.where(past, self.positions.diff(), 0.0)
        sums = (weighted * distances ** self.powers[:, None]).sum(dim=1)
        known = _at(self.ahead, clock.step)
        ahead = torch.where(known.isnan(), sums[0], known)
        share = self._share(clock) / torch.where(ahead == 0, 1.0, ahead)
        return torch.where(ahead == 0, 0.0, sums * share)

    def way(self, clock: ClockState) -> torch.Tensor:
        """`Clock.way`; 0 before the first computed step."""
        ends = torch.stack([_at(self.positions, clock.step + i) for i in (0, 1)])
        moved = (ends - _at(self.positions, clock.last)) / self.whole
        return torch.where(clock.computed > 0, moved, 0.0)

    def _share(self, clock: ClockState) -> torch.Tensor:
        """Return `Course.share`."""
        coming = _at(self.coming, clock.step)
        past = _at(self.positions, clock.step) - _at(self.positions, clock.last)
        way = torch.where(coming.isnan(), past, coming)
        return (1 - way / _at(self.left, clock.step)).clamp(min=0.0, max=1.0)


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def _at(numbers: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the number of a step."""
    index = step.clamp(max=len(numbers) - 1).to(torch.int64).reshape(1)
    return numbers.index_select(0, index).reshape(())
