"""`Course`: the steps of a generation, as far as they are known before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from dit_cache_fx.strategies.clock import MOMENTS
from dit_cache_fx.strategies.combined import Later
from dit_cache_fx.strategies.even import USUAL_STEPS
from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Course:
    """A generation's steps, as far as they are known in advance.

    `plan`: the schedule (None: a rule alone decides). `num_steps`: their number. `timesteps`: those
    of its calls, one for each step; `learnt`: they come from the generation before. `before`: the
    timesteps of the steps of its run that another model made (the plan is the run's). `ruled`: a
    rule decides besides the plan. `by_timestep`: distances are differences of timesteps, in steps
    of average length, instead of numbers of steps. `fading`: `Clock.gap` fades with the share of
    the remaining way that the coming interval takes.
    """

    plan: Schedule | None = None
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    learnt: bool = False
    before: tuple[float, ...] = ()
    ruled: bool = False
    by_timestep: bool = False
    fading: bool = False

    def computes(self, step: int) -> bool:
        """Return whether the schedule computes a step. The known number may turn out too small."""
        if step == 0:
            return True
        planned, number = self._at(step)
        return planned is not None and planned.computes(step, number)

    def next_computed(self, step: int) -> int | None:
        """Return the next step that the schedule computes after `step`; None if unknown."""
        planned, number = self._at(step)
        return None if planned is None else planned.next_computed(step, number)

    def covers(self, step: int) -> bool:
        """Return whether the timestep of this step is known."""
        return self.timesteps is not None and step < len(self.timesteps)

    @property
    def gains_nothing(self) -> bool:
        """Return whether a schedule based on the number of steps computes every step of the run."""
        if self.num_steps is None or self.plan is None or not self.plan.sets_share:
            return False
        whole = replace(self, timesteps=None, before=())
        if self.timesteps is not None:
            whole = replace(self, timesteps=(*self.before, *self.timesteps), before=())
        return all(map(whole.computes, range(self.num_steps + len(self.before))))

    # --- where the steps stand -------------------------------------------------------------------

    def position(self, step: int) -> float:
        """Return how far the timestep has moved up to a step, in steps of average length.

        The step's index if timesteps are unknown. Beyond the known ones each moves as far as the
        last.
        """
        known = self._positions
        if step < len(known):
            return known[step]
        if not known:
            return float(step)
        return known[-1] + (step + 1 - len(known)) * (known[-1] - known[-2])

    def distance(self, last: int, step: int) -> float:
        """Return the distance between two steps, on the axis of the strategy."""
        return self.position(step) - self.position(last) if self.by_timestep else step - last

    def gap(self, last: int, step: int) -> list[float]:
        """Return `Clock.gap` on a computed step. `last`: the computed step before it."""
        past = [(self._length(k), self.distance(last, k)) for k in range(last + 1, step)]
        sums = [sum(dt * distance**i for dt, distance in past) for i in range(MOMENTS)]
        known = self.ahead(step)
        ahead = sums[0] if known is None else known
        return [self.share(last, step) * total / ahead if ahead else 0.0 for total in sums]

    def ahead(self, step: int) -> float | None:
        """Return the sum of `dt` over the steps between a computed step and the next computed one.

        None if that one is unknown. The end of a generation counts as a computed step.
        """
        end = self._next_or_end(step)
        return None if end is None else sum(self._length(k) for k in range(step + 1, end))

    def share(self, last: int, step: int) -> float:
        """Return the share of `Clock.gap` that remains on a computed step: 1 without fading."""
        coming, left = self.coming(step), self.left(step)
        if coming is None:
            coming = self.position(step) - self.position(last)
        return min(max(1 - coming / left, 0.0), 1.0)

    def coming(self, step: int) -> float | None:
        """Return how far the timestep moves up to the next computed step; None if unknown."""
        end = self._next_or_end(step)
        return None if end is None else self.position(end) - self.position(step)

    def left(self, step: int) -> float:
        """Return how far it moves up to the generation's end; infinite without fading."""
        end = self._at(step)[1] if self.fading else None
        way = math.inf if end is None else self.position(end) - self.position(step)
        return way or math.inf

    def way(self, last: int, step: int) -> list[float]:
        """Return `Clock.way`. `last`: the computed step before it."""
        return [(self.position(end) - self.position(last)) / self.whole for end in (step, step + 1)]

    @property
    def whole(self) -> float:
        """Return how far the timestep moves in the whole generation, from first step to end."""
        return self.position(self._at(0)[1] or USUAL_STEPS)

    def _next_or_end(self, step: int) -> int | None:
        """Return the next computed step, or the generation's end; None if both are unknown."""
        if self.ruled:
            return None
        following = self.next_computed(step)
        return self._at(step)[1] if following is None else following

    def _length(self, step: int) -> float:
        return self.position(step + 1) - self.position(step)

    @cached_property
    def _positions(self) -> tuple[float, ...]:
        """Return the positions of the timesteps; empty if they are unknown or do not move."""
        timesteps = self.timesteps or (0.0,)
        first, way = timesteps[0], timesteps[-1] - timesteps[0]
        if way == 0:
            return ()
        return tuple((t - first) / way * (len(timesteps) - 1) for t in timesteps)

    # --- by what is known of a step --------------------------------------------------------------

    def _at(self, step: int) -> tuple[Schedule | None, int | None]:
        """Return the schedule and the number of steps that place a step."""
        if self.timesteps is not None and step < len(self.timesteps):
            return self._placed, len(self.timesteps)
        known = self.num_steps is not None and step < self.num_steps
        return self.plan, self.num_steps if known else None

    @cached_property
    def _placed(self) -> Schedule | None:
        assert self.timesteps is not None
        placed = self.plan and self.plan.placed((*self.before, *self.timesteps))
        return placed and (Later(placed, len(self.before)) if self.before else placed)
