"""Schedules that combine others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_cache_fx.strategies.schedule import Schedule


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


@dataclass(frozen=True)
class Later(Schedule):
    """The rest of a run's schedule, whose first `steps` steps belong to another model."""

    of: Schedule
    steps: int

    def computes(self, step: int, num_steps: int | None) -> bool:
        number = None if num_steps is None else num_steps + self.steps
        return step == 0 or self.of.computes(step + self.steps, number)
