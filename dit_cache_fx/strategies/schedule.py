"""Schedules: select the steps of a generation to compute in full.

A schedule is a pure function of the step and of the known properties of the generation: its number
of steps, and its timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar

from dit_cache_fx.errors import OptionError

#: ratios are converted to fractions with at most this denominator: 0.29 is 29 of 100
_DENOMINATOR = 1000
#: the assumed number of steps while it is unknown
USUAL_STEPS = 50
#: how far to search for the next computed step if the number of steps is unknown
_FAR = 1000


class Schedule:
    """Base class of the schedules. A subclass defines `computes`.

    Example:
        >>> class FirstHalf(dit_cache_fx.Schedule):
        ...     def computes(self, step, num_steps):
        ...         return num_steps is None or step < num_steps // 2
        >>> cached = dit_cache_fx.apply(model, "taylorcache", schedule=FirstHalf())
    """

    #: whether the steps depend on their number; if not, `num_steps` changes nothing
    needs_num_steps: ClassVar[bool] = True
    #: whether it is meant for generations with known timesteps
    needs_timesteps: ClassVar[bool] = False
    #: whether it chooses by itself how many of the steps compute
    sets_share: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        """Return whether a step computes in full. Step 0 always does.

        Args:
            step (`int`):
                The step, counted from 0.
            num_steps (`int | None`):
                The number of steps in the running generation, above `step`; None if unknown.
        """
        raise NotImplementedError

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        """Return the schedule for a generation whose timesteps are known.

        Args:
            timesteps (`Sequence[float]`):
                The timesteps, one for each call of the model, in the model's unit.
        """
        return self

    def next_computed(self, step: int, num_steps: int | None) -> int | None:
        """Return the next computed step after `step`; None if there is none, as far as is known.

        Args:
            step (`int`):
                The step, counted from 0.
            num_steps (`int | None`):
                The number of steps in the running generation; None if unknown.
        """
        end = step + _FAR if num_steps is None else num_steps
        return next((s for s in range(step + 1, end) if self.computes(s, num_steps)), None)

    def check(self, num_steps: int) -> None:
        """Check that the schedule fits a generation of `num_steps` steps.

        Args:
            num_steps (`int`):
                The number of steps.

        Raises:
            OptionError: The schedule cannot be followed in so many steps.
        """

    @property
    def meant_for(self) -> tuple[float, ...] | None:
        """The timesteps that the schedule was made for; None if it fits any.

        A generation that begins with the first of these is assumed to have them.
        """
        return None

    def otherwise(self) -> Schedule:
        """Return the schedule for a generation with other timesteps than expected."""
        return self

    def remark(self, timesteps: Sequence[float]) -> str | None:
        """Return a remark for the user on a generation with these timesteps; None if there is none.

        Args:
            timesteps (`Sequence[float]`):
                The timesteps, one for each call of the model, in the model's unit.
        """
        return None


@dataclass(frozen=True)
class ListedSteps(Schedule):
    """These steps, for any number of steps."""

    steps: frozenset[int]

    needs_num_steps: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        return step in self.steps

    def next_computed(self, step: int, num_steps: int | None) -> int | None:
        end = math.inf if num_steps is None else num_steps
        return min((s for s in self.steps if step < s < end), default=None)


@dataclass(frozen=True)
class Later(Schedule):
    """The rest of a run's schedule, whose first `steps` steps belong to another model."""

    of: Schedule
    steps: int

    def computes(self, step: int, num_steps: int | None) -> bool:
        number = None if num_steps is None else num_steps + self.steps
        return step == 0 or self.of.computes(step + self.steps, number)


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
        if isinstance(self.more, bool) or not isinstance(self.more, int) or self.more < 0:
            raise OptionError("more", self.more, "an integer from 0")

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
    free = {i: place for i, place in enumerate(places) if i not in ends}
    for i in range(1, count - 1):
        target = first + (last - first) * i / (count - 1)
        free.pop(min(free, key=lambda k: abs(free[k] - target)))
    return frozenset(range(len(places))) - frozenset(free)


def interval_schedule(num_steps: int, start: int, end: int, interval: int) -> set[int]:
    """Return the steps `range(0, start)`, `range(start, end, interval)`, `range(end, num_steps)`.

    This is the schedule of the published AngelSlim helpers.

    Args:
        num_steps (`int`):
            The number of steps in a generation.
        start (`int`):
            The first step of the sparse interval; all steps before it compute.
        end (`int`):
            The end of the sparse interval; this step and all after it compute.
        interval (`int`):
            The distance between computed steps in the sparse interval, in steps, from 1.

    Returns:
        The set of step indices, for `no_cache_steps`.

    Raises:
        OptionError: An argument is no such integer, or `start <= end <= num_steps` does not hold.

    Example:
        >>> steps = dit_cache_fx.interval_schedule(50, 11, 45, 4)  # of HunyuanVideo-1.5
        >>> len(steps)
        25
        >>> cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps)
    """
    for name, value in (("num_steps", num_steps), ("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(name, value, "an integer from 0")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise OptionError("interval", interval, "an integer from 1")
    if not start <= end <= num_steps:
        raise OptionError("start", start, f"start <= end={end} <= num_steps={num_steps} must hold")
    return {*range(start), *range(start, end, interval), *range(end, num_steps)}


def check_ratio(name: str, value: Any) -> None:
    """Raise `OptionError` if the value is no share of the steps."""
    if not _is_number(value) or not 0 < value <= 1:
        raise OptionError(name, value, "a share of the steps above 0 and at most 1, such as 0.5")


def check_num_steps(value: Any, source: str = "num_steps") -> None:
    """Raise `OptionError` if the value is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(source, value, "the number of steps of a generation: an integer from 1")


def check_computed_steps(value: Any, num_steps: int | None = None) -> None:
    """Raise `OptionError` if no generation, or none of `num_steps`, has so many steps."""
    expected = "the number of steps of a generation to compute in full: an integer from 1"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError("computed_steps", value, expected)
    if num_steps is not None and value > num_steps:
        most = f"{expected} to {num_steps}, the number of its steps"
        raise OptionError("computed_steps", value, most)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _passes(step: int, share: Fraction) -> bool:
    return step == 0 or step * share // 1 > (step - 1) * share // 1


def _fraction(ratio: float) -> Fraction:
    return max(Fraction(ratio).limit_denominator(_DENOMINATOR), Fraction(1, _DENOMINATOR))


#: the presets of `schedule="..."`; docs/schedules.md has the measurements
PRESETS: Mapping[str, EvenNoise] = MappingProxyType(
    {"quality": EvenNoise(0.4), "balanced": EvenNoise(0.2), "fast": EvenNoise(0.1)}
)


def named_schedule(value: Any) -> Schedule:
    """Return the schedule of `schedule=value`: of a preset's name, or the object itself."""
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, Schedule):
        return value
    raise OptionError("schedule", value, f"one of {list(PRESETS)}, or a Schedule object")
