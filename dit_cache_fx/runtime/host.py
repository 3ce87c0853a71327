"""The bookkeeping of a cached model's calls: steps, branches, and what was done on each."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from dit_cache_fx.errors import warn
from dit_cache_fx.identity import Seen
from dit_cache_fx.runtime.branches import MAX_BRANCHES, Branch, Session
from dit_cache_fx.runtime.count import StepCount
from dit_cache_fx.runtime.report import StepRecord
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.tracker import Tracker
from dit_cache_fx.specs import TensorSpec
from dit_cache_fx.strategies import Strategy

_CROWDED = (
    f"more than {MAX_BRANCHES} calls with one timestep are not told apart: every step is computed. "
    "Name each branch (cache_context), or put them into one batch"
)

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a call stands: its step, the step's branch and session, and its conditioning."""

    step: Step
    branch: Branch
    session: Session
    conditioning: Seen


class Host:
    """What one cached model knows of its calls, whatever graphs answer them."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.count = StepCount(strategy.num_steps)
        self.tracker = Tracker(self.count)
        self.timeline: deque[StepRecord] = deque(maxlen=4096)
        self.calls = {"computed": 0, "reused": 0}
        self._noted: object = None  # the generation whose steps are in the timeline
        self._warned: set[str] = set()

    def forget_calls(self) -> None:
        """Forget what the calls were."""
        self.timeline.clear()
        self.calls = {"computed": 0, "reused": 0}

    def warn_once(self, reason: str) -> None:
        """Warn that a call is not cached, with each reason once."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn(f"not cached: {reason}")

    # --- a call ------------------------------------------------------------------------------

    def begin(
        self,
        session: Session,
        value: float,
        conditioning: Seen,
        held: Mapping[str, TensorSpec],
        shapes: object = (),
    ) -> Place:
        """Move to a call with this timestep and conditioning.

        `held`: what its graph holds from step to step. `shapes`: of the masked selections that
        this comes from; what is held of others is forgotten. To be called within
        `session.restored_on_error()`, with `done` behind it.
        """
        if self.tracker.enter(session, value, conditioning):
            self.warn_once(_CROWDED)
        branch = session.branch_of(conditioning)
        if branch.shapes != shapes:
            branch.forget()
            branch.shapes = shapes
        assert session.moment is not None
        assert session.generation is not None
        index, num_steps = session.moment.index, session.generation.num_steps
        step = Step(self.strategy, branch, index, held, num_steps)
        return Place(step, branch, session, conditioning)

    def done(self, place: Place, value: float) -> None:
        """The call has succeeded."""
        step, branch, session, conditioning = place
        self.tracker.done(session, conditioning)
        action = "computed" if step.computes else self.strategy.action
        if session.generation is not self._noted:
            self.timeline.clear()
            self._noted = session.generation
        number = next(i for i, b in enumerate(session.branches) if b is branch)
        self.timeline.append(StepRecord(step.index, value, number, action))
        self.calls["computed" if step.computes else "reused"] += 1
        log.debug("step %d (timestep %g, branch %d): %s", step.index, value, number, action)
