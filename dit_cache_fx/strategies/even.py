"""Schedules of evenly spaced steps: by index, and by timestep."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from dit_cache_fx.strategies.checks import check_computed_steps, check_count, check_ratio
from dit_cache_fx.strategies.schedule import ListedSteps, Schedule

#: ratios are converted to fractions with at most this denominator: 0.29 is 29 of 100
_DENOMINATOR = 1000
#: the assumed number of steps while it is unknown
USUAL_STEPS = 50


@dataclass(frozen=True)
class EvenSteps(Schedule):
    """A share of the steps, evenly spaced: step 0, and each where `step * ratio` passes an integer.

    The sequence is the same for every number of steps: a ratio of 0.4 computes 0, 3, 5, 8, 10, ...

    Args:
        ratio (`float`):
            The share of the steps, above 0 and at most 1.

    Raises:
        OptionError: The ratio is no such number.

    Example:
        >>> schedule = dit_cache_fx.EvenSteps(0.4)
        >>> [step for step in range(12) if schedule.computes(step, 50)]
        [0, 3, 5, 8, 10]
        >>> cached = dit_cache_fx.apply(model, "taylorcache", schedule=schedule)
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
    share. While the number of steps is unknown, the share is that of a run of 50.

    Args:
        ratio (`float`):
            The share of the steps, above 0 and at most 1.
        more (`int`, defaults to `6`):
            The number of steps to compute in addition to the share.

    Raises:
        OptionError: An argument is no such number.

    Example:
        >>> schedule = dit_cache_fx.EvenAndLast(0.3, more=4)
        >>> sum(schedule.computes(step, 50) for step in range(50))
        19
        >>> cached = dit_cache_fx.apply(model, "taylorcache", schedule=schedule)
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
        """Return the share of the evenly spaced steps: the last one is added to them."""
        count = math.ceil(num_steps * _fraction(self.ratio)) + self.more
        return Fraction(min(max(count - 1, 1), num_steps), num_steps)


@dataclass(frozen=True)
class EvenTimesteps(Schedule):
    """A number of steps, evenly spaced in timestep, including step 0 and the last step.

    Computed step i of K is the one whose timestep is nearest to `first + (last - first) * i / (K -
    1)`, among those not chosen yet. While the timesteps are unknown, the steps are evenly spaced by
    index.

    Args:
        computed_steps (`int`):
            The number of steps to compute, from 1.

    Raises:
        OptionError: The number is no such integer, or larger than the number of steps.

    Example:
        >>> schedule = dit_cache_fx.EvenTimesteps(3).placed([1000.0, 990.0, 900.0, 510.0, 20.0])
        >>> [step for step in range(5) if schedule.computes(step, 5)]
        [0, 3, 4]
        >>> options = dict(schedule=dit_cache_fx.EvenTimesteps(10))
        >>> cached = dit_cache_fx.apply(model, "taylorcache", **options)
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
        nearest = (2 * step + 1) * parts // (2 * way)  # the last i whose place is up to here
        return 2 * nearest * way > (2 * step - 1) * parts

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        return ListedSteps(evenly_spaced(timesteps, self.computed_steps))

    def check(self, num_steps: int) -> None:
        check_computed_steps(self.computed_steps, num_steps)


@dataclass(frozen=True)
class EvenNoise(EvenAndLast):
    """As many computed steps as in `EvenAndLast`, evenly spaced in timestep.

    While the timesteps are unknown, the steps are those of `EvenAndLast`.
    """

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        steps = len(timesteps)
        count = sum(self.computes(step, steps) for step in range(1, steps))
        return ListedSteps(evenly_spaced(timesteps, count + 1))


def evenly_spaced(places: Sequence[float], count: int) -> frozenset[int]:
    """Return the indices of `count` places, evenly spaced from the first place to the last.

    If there are fewer places, all indices. Of two equally near places the first is chosen.
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
    """Return the taken places, plus the nearest free one for each target."""
    free = [i for i in range(len(places)) if i not in taken]
    for target in targets[: len(free)]:
        free.remove(min(free, key=lambda i: abs(places[i] - target)))
    return frozenset(range(len(places))) - frozenset(free)


def _passes(step: int, share: Fraction) -> bool:
    return step == 0 or step * share // 1 > (step - 1) * share // 1


def _fraction(ratio: float) -> Fraction:
    return max(Fraction(ratio).limit_denominator(_DENOMINATOR), Fraction(1, _DENOMINATOR))
