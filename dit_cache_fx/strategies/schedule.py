"""Schedules: select the steps of a generation to compute in full.

A schedule is a pure function of the step and of the known properties of the generation: its number
of steps, and its timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.checks import check_count

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
        check_count(name, value, 0)
    check_count("interval", interval, 1)
    if not start <= end <= num_steps:
        raise OptionError("start", start, f"start <= end={end} <= num_steps={num_steps} must hold")
    return {*range(start), *range(start, end, interval), *range(end, num_steps)}
