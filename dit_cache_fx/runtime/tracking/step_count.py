"""The steps of a generation as known before it begins: their number and their timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dit_cache_fx.errors import OptionError, warn
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue, number_of
from dit_cache_fx.strategies import Course, Strategy
from dit_cache_fx.strategies.checks import check_num_steps
from dit_cache_fx.strategies.timesteps import (
    Timesteps,
    checked_timesteps,
    contradicted,
    place_of,
    told_timesteps,
)

_HINT = "pass timesteps=, such as timesteps=lambda: pipe.scheduler.timesteps"
_UNKNOWN = (
    "the timesteps are unknown at a generation's first call, so the step's index replaces them "
    f"there: {_HINT}"
)
_SHORT = (
    f"a generation has more calls than timesteps: the step's index replaces them there; {_HINT}"
)
_OTHER = (
    f"the given timesteps are not those of the calls, so the step's index replaces them: {_HINT}, "
    "called once the sampler has set them"
)
_ALL = (
    "the schedule computes all {} steps of a generation: with so few a cache gains nothing, and "
    "the run is as fast without it (fewer computed steps, by computed_steps=, cost quality)"
)


class StepCount:
    """Steps and timesteps: those set on the cached model, else the options, else learnt ones.

    `given`, `given_timesteps`: set on the cached model. `began`: (timesteps of a run that several
    models share, index at which one of them begins) -> the index of the run's first; None for a
    model with runs of its own. `exact`: each step of a run has one of the given timesteps.
    `counted`, `learnt`: the steps and the timesteps of the newest generation that has ended (an
    aborted one counts up to its last call).
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.given: int | None = None
        self.given_timesteps: Timesteps | None = None
        self.began: Callable[[Sequence[float], int], int] | None = None
        self.exact = False
        self.counted: int | None = None
        self.learnt: tuple[float, ...] | None = None
        self.warned: set[str] = set()

    def ended(self, steps: int, values: Sequence[float]) -> None:
        """Record that a generation has ended. `values`: the timesteps of its calls, up to a gap."""
        self.counted = steps
        self.learnt = tuple(values) if len(values) == steps else None

    def forget(self) -> None:
        """Forget the learnt steps."""
        self.counted, self.learnt = None, None

    # --- as the user says ------------------------------------------------------------------------

    def told(self) -> int | None:
        """Return the given number. Raises `OptionError` if the option's function returns none."""
        option = self.strategy.num_steps
        if self.given is not None or not callable(option):
            return option if self.given is None else self.given  # type: ignore[return-value]
        number = option()
        check_num_steps(number, "num_steps()")
        return number

    @property
    def is_told(self) -> bool:
        """Return whether the user gave the number of steps."""
        return self.given is not None or self.strategy.num_steps is not None

    def told_timesteps(self, own: Timesteps | None = None) -> tuple[float, ...] | None:
        """Return the given timesteps. Raises `OptionError` if the function's result is wrong.

        `own`: those of one request, which take precedence.
        """
        option = self.strategy.timesteps if self.given_timesteps is None else self.given_timesteps
        option = option if own is None else own
        if callable(option):
            return told_timesteps(option)
        return None if option is None else checked_timesteps(option)

    def told_course(self, own: Timesteps | None = None) -> Course:
        """Return a generation's steps by the user's options only."""
        number, timesteps = self.told(), self.told_timesteps(own)
        if number is None and timesteps is not None:
            number = len(timesteps)
        if number is not None and self.strategy.plan is not None:
            self._check(number, known=not self.exact and own is None)
        return self.strategy.course(number, timesteps)

    def _check(self, number: int, known: bool) -> None:
        """Check that the schedule fits so many steps.

        It raises if the user gave the number in advance (`known`). A run that turns out shorter
        computes all of its steps.
        """
        assert self.strategy.plan is not None
        try:
            self.strategy.plan.check(number)
        except OptionError:
            if known:
                raise
            self._warn_once(_ALL.format(number))

    # --- for a generation ------------------------------------------------------------------------

    def course(self, value: TimestepValue | None, own: Timesteps | None = None) -> Course:
        """Return the steps of a generation that begins with this timestep (None: unknown).

        `own`: the timesteps of its request.
        """
        told = self.told_course(own)
        first = None if value is None else number_of(value, told.timesteps)
        if told.timesteps is None:
            course = self._learnt_course(told.num_steps, first)
        elif first is None:
            course = told
        else:
            course = self._left(told.timesteps, told.num_steps, first)
        if course.gains_nothing:
            self._warn_once(_ALL.format(len(course.before) + (course.num_steps or 0)))
        return self._remarked(course)

    def told_steps(self, course: Course, own: bool = False) -> int | None:
        """Return the number of steps of a generation with this course; None if it was learnt."""
        said = (self.exact or own) and course.timesteps is not None and not course.learnt
        return course.num_steps if said or self.is_told else None

    def _left(self, told: tuple[float, ...], number: int | None, value: float) -> Course:
        """Return the steps from a first call on: image-to-image and resumed runs start later."""
        at = place_of(told, value) or 0
        begin = at if self.began is None else self.began(told, at)
        number = len(told) - at if number == len(told) else number
        return replace(self.strategy.course(number, told[at:]), before=told[begin:at])

    def _learnt_course(self, number: int | None, value: float | None) -> Course:
        """Return the steps by the timesteps of the generation before, or those of the plan."""
        for known in (self.learnt, self._meant):
            if known is not None and known[0] == value and number in (None, len(known)):
                course = self.strategy.course(len(known), known)
                return replace(course, learnt=True)
        self._warn_where_needed(_UNKNOWN)
        return self.strategy.course(number or self.counted)

    def lasting_course(self) -> Course:
        """Return the steps of every generation of a program that gets no information later."""
        told, meant = self.told_course(), self._meant
        if told.timesteps is not None or meant is None or told.num_steps not in (None, len(meant)):
            return told
        return self.strategy.course(len(meant), meant)

    @property
    def _meant(self) -> tuple[float, ...] | None:
        plan = self.strategy.plan
        return None if plan is None else plan.meant_for

    def _remarked(self, course: Course) -> Course:
        """Return the course after warning once about its limits."""
        if course.plan is not None and course.timesteps is not None:
            remark = course.plan.remark(course.timesteps)
            if remark is not None:
                self._warn_once(remark)
        return course

    def on_way(self, course: Course, values: Sequence[float], step: int, value: float) -> Course:
        """Return a course of known timesteps at a call; if it is another run's, they are unknown.

        `values`: the timesteps so far, one for each step; `value`: this call's.
        """
        if not course.covers(step):
            self._warn_where_needed(_SHORT)
        elif step == 1 and len(values) == 1 and self._is_anothers(course, (values[0], value)):
            plan = course.plan and course.plan.otherwise()
            return replace(course, timesteps=None, plan=plan)
        return course

    def _is_anothers(self, course: Course, values: tuple[float, float]) -> bool:
        assert course.timesteps is not None
        if course.learnt and course.timesteps[:2] != values:
            self._warn_where_needed(_UNKNOWN)
            return True
        if not course.learnt and contradicted(course.timesteps, *values):
            self._warn_once(_OTHER)
            return True
        return False

    def _warn_where_needed(self, message: str) -> None:
        if self.strategy.needs_timesteps:
            self._warn_once(message)

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warn(message)
