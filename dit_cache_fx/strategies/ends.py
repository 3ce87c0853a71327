"""Schedules of a generation's first and last steps, and unions of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True)
class AnyOf(Schedule):
    """Every step that one of several schedules computes."""

    schedules: tuple[Schedule, ...]

    @property
    def needs_num_steps(self) -> bool:  # type: ignore[override]
        return any(schedule.needs_num_steps for schedule in self.schedules)

    @property
    def needs_timesteps(self) -> bool:  # type: ignore[override]
        return any(schedule.needs_timesteps for schedule in self.schedules)

    def computes(self, step: int, num_steps: int | None) -> bool:
        return any(schedule.computes(step, num_steps) for schedule in self.schedules)

    def placed(self, timesteps: Sequence[float]) -> Schedule:
        return AnyOf(tuple(schedule.placed(timesteps) for schedule in self.schedules))

    def next_computed(self, step: int, num_steps: int | None) -> int | None:
        following = (schedule.next_computed(step, num_steps) for schedule in self.schedules)
        return min((s for s in following if s is not None), default=None)

    def check(self, num_steps: int) -> None:
        for schedule in self.schedules:
            schedule.check(num_steps)

    def __str__(self) -> str:
        return " and ".join(map(str, self.schedules))


def with_ends(schedule: Schedule | None, first: int, last: int = 0) -> Schedule | None:
    """Add the first and the last steps to a schedule, if there is one."""
    if not first and not last:
        return schedule
    ends = EndSteps(first, last)
    return ends if schedule is None else AnyOf((ends, schedule))
