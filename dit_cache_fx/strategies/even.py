"""Schedules of evenly spaced steps: by index, and by timestep."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from dit_cache_fx.strategies.checks import check_computed_steps, check_count, check_ratio
from dit_cache_fx.strategies.schedule import ListedSteps, Schedule

#: a ratio is taken as a fraction with at most this denominator, so that 0.29 is 29 of 100
_DENOMINATOR = 1000
#: how many steps a generation is taken to have as long as nothing is known of it
USUAL_STEPS = 50


@dataclass(frozen=True)
class EvenSteps(Schedule):
    """A share of the steps, evenly spaced: step 0, and each where `step * ratio` passes an integer.

    The sequence is the same for every number of steps: a ratio of 0.4 computes 0, 3, 5, 8, 10, ...

    Args:
        ratio (`float`):
            The share of the steps, above 0 and at most 1.

    Example:
        >>> dit_cache_fx.apply(model, "taylorcache", schedule=dit_cache_fx.EvenSteps(0.4))
    """

    ratio: float

    needs_num_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)

    def computes(self, step: int, num_steps: int | None) -> bool:
        return _passes(step, _fraction(self.ratio))


@dataclass(frozen=True)
class EvenAndLast(Schedule):
    """A share of the steps and `more` of them: evenly spaced ones, and the last.

    A skipped step costs in proportion to its share of the way, so short runs compute a larger
    share. As long as the number of steps is not known, the share is that of a run of 50.

    Args:
        ratio (`float`):
            The share of the steps, above 0 and at most 1.
        more (`int`, defaults to `6`):
            The number of steps to compute on top of the share.

    Example:
        >>> dit_cache_fx.apply(model, "taylorcache", schedule=dit_cache_fx.EvenAndLast(0.3, more=4))
    """

    ratio: float
    more: int = 6

    sets_share: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        check_count("more", self.more, 0)

    def computes(self, step: int, num_steps: int | None) -> bool:
        if num_steps is None:
            return _passes(step, self._even(USUAL_STEPS))
        return step == num_steps - 1 or _passes(step, self._even(num_steps))

    def _even(self, num_steps: int) -> Fraction:
        """The share of the evenly spaced steps: the last one comes on top."""
        count = math.ceil(num_steps * _fraction(self.ratio)) + self.more
        return Fraction(min(max(count - 1, 1), num_steps), num_steps)


@dataclass(frozen=True)
class EvenTimesteps(Schedule):
    """A number of steps, evenly spaced in timestep: step 0 and the last are among them.

    Computed step i of K is the one whose timestep is nearest to
    `first + (last - first) * i / (K - 1)`, among those not taken yet. As long as the timesteps are
    not known, the steps are evenly spaced by index.

    Args:
        computed_steps (`int`):
            The number of steps to compute, from 1.

    Example:
        >>> dit_cache_fx.apply(model, "taylorcache", schedule=dit_cache_fx.EvenTimesteps(10))
    """

    computed_steps: int

    needs_timesteps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_computed_steps(self.computed_steps)

    def computes(self, step: int, num_steps: int | None) -> bool:
        if num_steps is None:
            return _passes(step, Fraction(min(self.computed_steps, USUAL_STEPS), USUAL_STEPS))
        parts, way = self.computed_steps - 1, num_steps - 1
        if step == 0 or parts >= way:
            return True
        nearest = (2 * step + 1) * parts // (2 * way)  # the last i with its place up to here
        return 2 * nearest * way > (2 * step - 1) * parts

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        return ListedSteps(evenly_spaced(timesteps, self.computed_steps))

    def check(self, num_steps: int) -> None:
        check_computed_steps(self.computed_steps, num_steps)


@dataclass(frozen=True)
class EvenNoise(EvenAndLast):
    """As many computed steps as `EvenAndLast` has, evenly spaced in timestep.

    As long as the timesteps are not known, they are the steps of `EvenAndLast`.
    """

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        steps = len(timesteps)
        count = sum(self.computes(step, steps) for step in range(1, steps))
        return ListedSteps(evenly_spaced(timesteps, count + 1))


def evenly_spaced(places: Sequence[float], count: int) -> frozenset[int]:
    """The indexes of `count` places, evenly spaced from the first place to the last.

    Where there are not as many, the indexes of all. Of two places that are equally near the first
    is taken.
    """
    if count >= len(places):
        return frozenset(range(len(places)))
    first, last = places[0], places[-1]
    ends = {0, len(places) - 1} if count > 1 else {0}
    targets = [first + (last - first) * i / (count - 1) for i in range(1, count - 1)]
    return nearest(targets, places, ends)


def nearest(
    targets: Sequence[float], places: Sequence[float], taken: Collection[int]
) -> frozenset[int]:
    """The places that are taken, and the nearest free one for each target."""
    free = [i for i in range(len(places)) if i not in taken]
    for target in targets[: len(free)]:
        free.remove(min(free, key=lambda i: abs(places[i] - target)))
    return frozenset(range(len(places))) - frozenset(free)


def _passes(step: int, share: Fraction) -> bool:
    return step == 0 or step * share // 1 > (step - 1) * share // 1


def _fraction(ratio: float) -> Fraction:
    return max(Fraction(ratio).limit_denominator(_DENOMINATOR), Fraction(1, _DENOMINATOR))
