"""Which steps of a generation are computed in full.

A schedule is a pure function of the step and of what is known of the generation: its number of
steps, and its timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar

from dit_cache_fx.errors import OptionError

#: a ratio is taken as a fraction with at most this denominator, so that 0.29 is 29 of 100
_DENOMINATOR = 1000
#: how many steps a generation is taken to have as long as nothing is known of it
USUAL_STEPS = 50
#: how far to look for the next computed step where the number of steps is not known
_FAR = 1000


class Schedule:
    """Base class of the schedules. A schedule of your own defines `computes`.

    Example:
        >>> class FirstHalf(dit_cache_fx.Schedule):
        ...     def computes(self, step, num_steps):
        ...         return num_steps is None or step < num_steps // 2
        >>> dit_cache_fx.apply(model, "taylorcache", schedule=FirstHalf())
    """

    #: whether it places its steps by their number; if not, `num_steps` changes nothing
    needs_num_steps: ClassVar[bool] = True
    #: whether it is meant for generations whose timesteps are known
    needs_timesteps: ClassVar[bool] = False
    #: whether it chooses by itself how many steps are computed, of however many there are
    sets_share: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        """Whether a step computes in full. Step 0 always does.

        Args:
            step (`int`):
                The step, counted from 0.
            num_steps (`int | None`):
                The number of steps in the running generation, above `step`; None where it is not
                known.
        """
        raise NotImplementedError

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        """The schedule for a generation whose timesteps are known.

        Args:
            timesteps (`Sequence[float]`):
                The timesteps, one for each call of the model.
        """
        return self

    def next_computed(self, step: int, num_steps: int | None) -> int | None:
        """The next computed step after `step`; None where there is none, as far as is known.

        Args:
            step (`int`):
                The step, counted from 0.
            num_steps (`int | None`):
                The number of steps in the running generation; None where it is not known.
        """
        end = step + _FAR if num_steps is None else num_steps
        return next((s for s in range(step + 1, end) if self.computes(s, num_steps)), None)

    def check(self, num_steps: int) -> None:
        """Check that the schedule suits a generation of `num_steps` steps.

        Args:
            num_steps (`int`):
                The number of steps.

        Raises:
            OptionError: The schedule cannot be followed in so many steps.
        """

    @property
    def meant_for(self) -> tuple[float, ...] | None:
        """The timesteps that it was made for, where it was made for some.

        A generation that begins with the first of these is taken to have them.
        """
        return None

    def otherwise(self) -> Schedule:
        """The schedule for a generation that turns out to have other timesteps than expected."""
        return self

    def remark(self, timesteps: Sequence[float]) -> str | None:
        """A remark for the user about a generation with these timesteps; None if there is none.

        Args:
            timesteps (`Sequence[float]`):
                The timesteps, one for each call of the model.
        """
        return None


@dataclass(frozen=True)
class ListedSteps(Schedule):
    """These steps, however many there are."""

    steps: frozenset[int]

    needs_num_steps: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        return step in self.steps

    def next_computed(self, step: int, num_steps: int | None) -> int | None:
        end = math.inf if num_steps is None else num_steps
        return min((s for s in self.steps if step < s < end), default=None)


@dataclass(frozen=True)
class Later(Schedule):
    """The rest of a run's schedule, whose first `steps` steps are another model's."""

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
        if isinstance(self.more, bool) or not isinstance(self.more, int) or self.more < 0:
            raise OptionError("more", self.more, "an integer from 0")

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
    free = {i: place for i, place in enumerate(places) if i not in ends}
    for i in range(1, count - 1):
        target = first + (last - first) * i / (count - 1)
        free.pop(min(free, key=lambda k: abs(free[k] - target)))
    return frozenset(range(len(places))) - frozenset(free)


def interval_schedule(num_steps: int, start: int, end: int, interval: int) -> set[int]:
    """The steps `range(0, start)`, `range(start, end, interval)` and `range(end, num_steps)`.

    Args:
        num_steps (`int`):
            The number of steps in a generation.
        start (`int`):
            The first step of the sparse interval; all steps before it compute.
        end (`int`):
            The end of the sparse interval; this step and all after it compute.
        interval (`int`):
            The distance between computed steps in the sparse interval, from 1.

    Returns:
        The steps, for `no_cache_steps`.

    Raises:
        OptionError: An argument is no such integer, or `start <= end <= num_steps` does not hold.

    Example:
        >>> dit_cache_fx.interval_schedule(50, 11, 45, 4)  # HunyuanVideo-1.5: 25 of 50 steps
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
    """Raise `OptionError` where it is no share of the steps."""
    if not _is_number(value) or not 0 < value <= 1:
        raise OptionError(name, value, "a share of the steps above 0 and at most 1, such as 0.5")


def check_num_steps(value: Any, source: str = "num_steps") -> None:
    """Raise `OptionError` where it is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(source, value, "the steps of a generation: an integer from 1")


def check_computed_steps(value: Any, num_steps: int | None = None) -> None:
    """Raise `OptionError` where no generation, or none of `num_steps`, has so many steps."""
    expected = "how many steps of a generation are computed in full: an integer from 1"
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


#: what `schedule="..."` stands for; docs/schedules.md has the measurements
PRESETS: Mapping[str, EvenNoise] = MappingProxyType(
    {"quality": EvenNoise(0.4), "balanced": EvenNoise(0.2), "fast": EvenNoise(0.1)}
)


def named_schedule(value: Any) -> Schedule:
    """The schedule of `schedule=value`: a preset's name, or the object itself."""
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, Schedule):
        return value
    raise OptionError("schedule", value, f"one of {list(PRESETS)}, or a Schedule object")
