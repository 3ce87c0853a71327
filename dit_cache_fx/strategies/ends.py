"""Schedules of a generation's first and last steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_cache_fx.strategies.combined import AnyOf
from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True)
class EndSteps(Schedule):
    """The first steps, and the last ones if the number of steps is known."""

    first: int
    last: int = 0

    needs_num_steps: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        return step < self.first or (num_steps is not None and step >= num_steps - self.last)

    def __str__(self) -> str:
        return " and ".join(
            f"the {which} {count}"
            for which, count in (("first", self.first), ("last", self.last))
            if count
        )


def with_ends(schedule: Schedule | None, first: int, last: int = 0) -> Schedule | None:
    """Add the first and the last steps to a schedule, if there is one."""
    if not first and not last:
        return schedule
    ends = EndSteps(first, last)
    return ends if schedule is None else AnyOf((ends, schedule))
