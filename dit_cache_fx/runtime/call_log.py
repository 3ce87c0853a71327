"""The bookkeeping of a cached model's calls: steps, branches, and what was done on each."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dit_cache_fx.errors import warn
from dit_cache_fx.runtime.branches import MAX_BRANCHES, Branch, Session
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.tracker import Tracker
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.values.identity import Seen
from dit_cache_fx.values.tensor_spec import TensorSpec

_CROWDED = (
    f"more than {MAX_BRANCHES} calls with one timestep are not told apart: every step is computed. "
    "Name each branch (cache_context), or put them into one batch"
)

#: why a call runs uncached while autograd is on
WANTS_GRADIENTS = (
    "gradients are enabled and wanted (call the model under torch.no_grad() or "
    "torch.inference_mode())"
)

#: most calls of a generation that are noted
MAX_RECORDS = 4096

Measured = torch.Tensor | float | None

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One call in the last generation. `action`: "computed", "reused" or "predicted".

    `why`: why it computed. `graph`: the number of the captured graph. `context`: the cache context.
    A branch is one of a graph and context. `measured`: what the strategy's own rule had measured
    when it decided.
    """

    step: int
    timestep: float
    branch: int
    action: str
    why: str = ""
    graph: int = 0
    context: str | None = None
    measured: float | None = None

    def __str__(self) -> str:
        where = f"branch {self.branch}" if self.context is None else f"{self.context!r}"
        text = f"step {self.step} (timestep {self.timestep:g}, {where}): {self.action}"
        notes = [self.why] if self.why else []
        notes += [] if self.measured is None else [f"measured {self.measured:.4g}"]
        return f"{text} ({', '.join(notes)})" if notes else text


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
        self.count = StepCount(strategy)
        self.tracker = Tracker(self.count)
        self.timeline: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        #: beside it: what the strategy's rule measured, not yet read from a device
        self.measured: deque[Measured] = deque(maxlen=MAX_RECORDS)
        self.calls = {"computed": 0, "reused": 0}
        self._noted: object = None  # the generation whose steps are in the timeline
        self._warned: set[str] = set()

    def forget_calls(self) -> None:
        """Forget what the calls were."""
        self._clear_timeline()
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
        index, generation = session.moment.index, session.generation
        generation.course = self.count.on_way(generation.course, generation.values, index, value)
        step = Step(self.strategy, branch, index, held, generation.course)
        return Place(step, branch, session, conditioning)

    def done(self, place: Place, value: float) -> None:
        """The call has succeeded."""
        step, branch, session, conditioning = place
        self.tracker.done(session, conditioning)
        action = "computed" if step.computes else self.strategy.action
        if session.generation is not self._noted:
            self._clear_timeline()
            self._noted = session.generation
        number = next(i for i, b in enumerate(session.branches) if b is branch)
        record = StepRecord(
            step.index, value, number, action, step.why, session.serial, session.context
        )
        self.timeline.append(record)
        self.measured.append(self._measured(branch))
        self.calls["computed" if step.computes else "reused"] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", _read(record, self.measured[-1]))

    def records(self) -> list[StepRecord]:
        """The last generation's calls. Reads what the rule measured from its device."""
        return list(map(_read, self.timeline, self.measured))

    def _measured(self, branch: Branch) -> Measured:
        """As a number where that waits for no device; else a copy, since state may be cleared."""
        tensor = None if branch.memory is None else self.strategy.measured(branch.memory)
        if tensor is None:
            return None
        return float(tensor) if tensor.device.type == "cpu" else tensor.clone()

    def _clear_timeline(self) -> None:
        self.timeline.clear()
        self.measured.clear()


def _read(record: StepRecord, measured: Measured) -> StepRecord:
    return record if measured is None else replace(record, measured=float(measured))
