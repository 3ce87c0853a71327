"""The computed steps of a calibrated plan, and their transfer to other timesteps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import nn

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.even import EvenSteps, nearest
from dit_cache_fx.strategies.model_signature import ModelSignature
from dit_cache_fx.strategies.schedule import ListedSteps, Schedule
from dit_cache_fx.strategies.timesteps import ROUNDED, UNITS

#: a timestep that is smaller than the calibrated ones by this factor is in another unit
_OTHER_UNIT = 50.0


@dataclass(frozen=True)
class CalibratedSteps(Schedule):
    """The computed steps of a calibrated generation.

    In a generation with other timesteps, or another number of them, each computed step goes to the
    nearest free step in timestep (the noise level), and the last one to the last. If only the
    number of steps is known, they go by their share of the way. If a generation turns out to have
    other timesteps than it began with, the same share of its steps computes, evenly spaced.

    `steps`: their indices. `timesteps`: of the calibrated generation's calls, in the model's unit.
    `model`: the model of the calibration.
    """

    steps: frozenset[int]
    timesteps: tuple[float, ...]
    model: ModelSignature

    needs_num_steps: ClassVar[bool] = False
    needs_timesteps: ClassVar[bool] = True

    @property
    def meant_for(self) -> tuple[float, ...]:
        return self.timesteps

    def computes(self, step: int, num_steps: int | None) -> bool:
        if num_steps is None or num_steps == len(self.timesteps):
            return step in self.steps or step >= len(self.timesteps)
        shares = [s / len(self.timesteps) for s in self._later]
        return step in nearest(shares, [i / num_steps for i in range(num_steps)], {0})

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        return ListedSteps(self.steps if self._is_for(timesteps) else self._carried(timesteps))

    def otherwise(self) -> Schedule:
        return EvenSteps(len(self.steps) / len(self.timesteps))

    def remark(self, timesteps: Sequence[float]) -> str | None:
        if self._is_for(timesteps):
            return None
        return (
            f"the plan was calibrated for {len(self.timesteps)} steps of other timesteps, and is "
            f"carried over to these {len(timesteps)} by noise level: "
            f"{len(self._carried(timesteps))} are computed. Calibrate with these timesteps for "
            "the best result"
        )

    def __str__(self) -> str:
        return f"calibrated, {len(self.steps)} of {len(self.timesteps)} steps"

    def _is_for(self, timesteps: Sequence[float]) -> bool:
        """Return whether these are the calibrated timesteps, in any unit, apart from rounding."""
        if len(timesteps) != len(self.timesteps):
            return False
        allowed = ROUNDED * max(map(abs, timesteps))
        return any(
            all(abs(a - b) <= allowed for a, b in zip(own, timesteps, strict=True))
            for own in _in_units(self.timesteps)
        )

    def _carried(self, timesteps: Sequence[float]) -> frozenset[int]:
        if len(timesteps) < 2 or timesteps[0] == timesteps[-1]:
            return frozenset(range(len(timesteps)))
        own = next((o for o in _in_units(self.timesteps) if _covers(o, timesteps)), None)
        if own is None:  # in an unknown unit: from first to last
            scale = (timesteps[-1] - timesteps[0]) / (self.timesteps[-1] - self.timesteps[0] or 1)
            own = [timesteps[0] + scale * (t - self.timesteps[0]) for t in self.timesteps]
        way, half = 1 if timesteps[-1] > timesteps[0] else -1, (timesteps[1] - timesteps[0]) / 2
        last = len(self.timesteps) - 1
        left = [own[s] for s in sorted(self.steps) if way * (own[s] - timesteps[0] + half) >= 0]
        ends = {0}
        if last in self.steps:  # goes to the last one, wherever it is
            ends, left = {0, len(timesteps) - 1}, left[:-1]
        if left and way * (left[0] - timesteps[0] - half) <= 0:  # the first stands for it
            left = left[1:]
        return nearest(left, timesteps, ends)

    @property
    def _later(self) -> list[int]:
        """Return the computed steps after the first."""
        return sorted(self.steps - {0})


def _in_units(timesteps: Sequence[float]) -> list[list[float]]:
    """Return the timesteps in each unit that models and schedulers use."""
    units = [*UNITS, *((1 / scale, -shift / scale) for scale, shift in UNITS[1:])]
    return [[scale * t + shift for t in timesteps] for scale, shift in units]


def _covers(own: Sequence[float], timesteps: Sequence[float]) -> bool:
    """Return whether timesteps follow the same course as others, in their range and unit."""
    way, other = own[-1] - own[0], timesteps[-1] - timesteps[0]
    slack = 2 * max(_longest(own), _longest(timesteps))
    inside = min(own) - slack <= min(timesteps) and max(timesteps) <= max(own) + slack
    one_unit = abs(way) <= _OTHER_UNIT * abs(other)
    return way * other > 0 and inside and one_unit


def _longest(timesteps: Sequence[float]) -> float:
    return max(abs(b - a) for a, b in pairwise(timesteps))


def check_model(strategy: Strategy, model: nn.Module) -> None:
    """Raise `OptionError` if a plan was calibrated for another model."""
    if isinstance(strategy.schedule, CalibratedSteps):
        _refuse(strategy.schedule.model.unlike(model))


def check_graph(
    strategy: Strategy, blocks: Mapping[str, int], shapes: Iterable[Sequence[int]]
) -> None:
    """Check a plan against a graph: its block lists (name -> length), and parameters if known."""
    if isinstance(strategy.schedule, CalibratedSteps):
        _refuse(strategy.schedule.model.unlike_graph(blocks, shapes))


def _refuse(differences: Sequence[str]) -> None:
    if differences:
        raise OptionError(
            "strategy",
            "a calibrated plan",
            f"it is for another model: {'; '.join(differences)}. Calibrate this one "
            "(dit_cache_fx.calibrate)",
        )
