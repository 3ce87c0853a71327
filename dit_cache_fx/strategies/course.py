"""What is known of a generation before it begins: its steps, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Course:
    """A generation's steps, as far as they are known beforehand.

    `plan`: which are computed (None: a rule alone decides). `num_steps`: how many there are.
    `timesteps`: those of its calls, one for each step; `learnt`: they are those of the generation
    before.
    """

    plan: Schedule | None = None
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    learnt: bool = False

    def computes(self, step: int) -> bool:
        """Whether the schedule computes a step. What was known may turn out too short."""
        if step == 0:
            return True
        planned, number = self._at(step)
        return planned is not None and planned.computes(step, number)

    def next_computed(self, step: int) -> int | None:
        """The next step that the schedule computes after `step`; None where it is not known."""
        planned, number = self._at(step)
        return None if planned is None else planned.next_computed(step, number)

    def covers(self, step: int) -> bool:
        """Whether there are timesteps, as many as it takes for this step."""
        return self.timesteps is not None and step < len(self.timesteps)

    def _at(self, step: int) -> tuple[Schedule | None, int | None]:
        """The schedule and the number of steps by which a step is placed."""
        if self.timesteps is not None and step < len(self.timesteps):
            return self._placed, len(self.timesteps)
        known = self.num_steps is not None and step < self.num_steps
        return self.plan, self.num_steps if known else None

    @cached_property
    def _placed(self) -> Schedule | None:
        assert self.timesteps is not None
        return self.plan and self.plan.placed(self.timesteps)
