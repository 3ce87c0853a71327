"""Bookkeeping of a cached model's calls: steps, branches, and the action on each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dit_cache_fx.errors import warn
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.step import MISSING, Step
from dit_cache_fx.runtime.step_record import StepRecord
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.hooks import NO_HOOKS, Hooked
from dit_cache_fx.runtime.tracking.matching import CallEvidence
from dit_cache_fx.runtime.tracking.placement import Placement, place
from dit_cache_fx.runtime.tracking.session import MAX_BRANCHES, Session
from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue, as_number, timestep_value
from dit_cache_fx.runtime.tracking.tracker import Tracker
from dit_cache_fx.runtime.tracking.trajectory import SampleProbe
from dit_cache_fx.strategies import Course, Strategy
from dit_cache_fx.values.host_copies import HostCopies, is_on_host
from dit_cache_fx.values.identity import TensorIdentity

_CROWDED = (
    f"a step calls more than {MAX_BRANCHES} branches, and a session holds no more than that: the "
    "others compute on every step. Put them into one batch, or give each its own session "
    "(cached.new_session())"
)

#: calls in a row without state before a warning
_STARVED = 8
#: calls in a row with a capture before a warning
_CAPTURED = 10

#: reasons why a call is not cached while autograd is on
WANTS_GRADIENTS = (
    "gradients are enabled and required (call the model under torch.no_grad() or "
    "torch.inference_mode())"
)

Measured = torch.Tensor | float | None

log = logging.getLogger(__name__)


class CallStart(NamedTuple):
    """A call that is under way: its session, its place there, and its step."""

    session: Session
    placement: Placement
    step: Step


class CallLog:
    """The record of one cached model's calls, whatever graphs answer them."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.count = StepCount(strategy)
        self.tracker = Tracker(self.count)
        self.calls = {"computed": 0, "reused": 0}
        self._copies = HostCopies()
        self._warned: set[str] = set()

    @property
    def course(self) -> Course | None:
        """The known steps of the newest generation; None before the first call."""
        newest = self.tracker.session.newest
        return None if newest is None else newest.course

    @property
    def num_steps(self) -> int | None:
        """The expected number of steps of the newest generation; None if unknown."""
        course = self.course
        return None if course is None else course.num_steps

    def forget_calls(self) -> None:
        """Forget the calls."""
        for session in self.tracker.sessions():
            session.records.clear()
        self.calls = {"computed": 0, "reused": 0}

    def warn_once(self, reason: str) -> None:
        """Warn that a call is not cached, once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn(f"not cached: {reason}")

    # --- a call ------------------------------------------------------------------------------

    def read(self, timestep: torch.Tensor) -> TimestepValue:
        """Return the values of a timestep tensor.

        Waits for the device if the tensor is on one, unless it is a part of a tensor that was read.
        """
        known = None if is_on_host(timestep) else self._copies.value(timestep)
        return timestep_value(timestep) if known is None else known

    def evidence(
        self,
        session: Session,
        lowered: Lowered,
        key: Hashable,
        value: TimestepValue,
        tensors: Sequence[torch.Tensor],
        derived: bool = False,
        hooked: Hooked = NO_HOOKS,
    ) -> CallEvidence:
        """Collect the evidence for the branch of a call. `key`: its signature; `tensors`: its own.

        A tensor that is passed as the sample and as another argument counts as sample only.
        """
        sample = None if lowered.sample is None else tensors[lowered.sample]
        places = [i for i in lowered.conditioning if tensors[i] is not sample]
        return CallEvidence(
            (key, *[lowered.program.inputs[i] for i in places]),
            lowered.serial,
            self.tracker.context,
            value,
            session.explicit is not None,
            TensorIdentity([tensors[i] for i in places], _signed(lowered)),
            None if sample is None else _probe(lowered, sample),
            derived,
            hooked,
        )

    def begin(
        self,
        session: Session,
        call: CallEvidence,
        lowered: Lowered,
        shapes: object = (),
    ) -> CallStart:
        """Find the branch and the step of a call; nothing is recorded before `done`.

        `lowered`: its graph. `shapes`: of its masked selections; cached tensors from other shapes
        are not used.
        """
        placed = place(session, call, self.count)
        if placed.branch.shapes != shapes:
            emptied = replace(placed.branch.emptied(), shapes=shapes)
            placed = replace(placed, branch=emptied, replaced=placed.replaced or placed.branch)
        cached = lowered.variants.cached
        step = Step(
            lowered.strategy, placed.branch, placed.index, cached, placed.course, placed.missed
        )
        return CallStart(session, placed, step)

    def done(
        self,
        start: CallStart,
        arguments: Callable[[], Sequence[str]],
        captured: object = None,
    ) -> None:
        """Record that the call has succeeded.

        `arguments`: the names of the conditioning arguments. `captured`: the reason for a capture,
        if there was one.
        """
        session, placed, step = start
        fits = placed.settle(session, answered=True)
        self._warn_starved(start, fits, arguments)
        self._warn_captured(start, captured)
        if placed.generation is not session.noted:
            session.records.clear()
            session.noted = placed.generation
        session.records.append((self._noted(start), self._metric(step, placed.branch)))
        self.calls["computed" if step.computes else "reused"] += 1
        self.tracker.called(session)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", _read(*session.records[-1]))

    def passed(self, session: Session, call: CallEvidence) -> None:
        """Record a call that the model itself has answered: it counts as a step."""
        placed = place(session, call, self.count)
        placed.settle(session, answered=False)

    def records(self) -> list[StepRecord]:
        """Return the last generation's calls. Reads the rule's measurements from the device."""
        return [_read(*noted) for noted in self.tracker.reported.records]

    def _noted(self, start: CallStart) -> tuple[Any, ...]:
        """Return the first fields of a `StepRecord`: most calls are never reported."""
        placed, step = start.placement, start.step
        call = placed.call
        return (
            step.index,
            as_number(call.value),
            placed.branch.number,
            "computed" if step.computes else self.strategy.action,
            step.why,
            call.serial,
            "/".join(call.context) or None,
        )

    def _metric(self, step: Step, branch: Branch) -> Measured:
        """Return the metric as a number if the device need not be waited for, otherwise a copy."""
        state, measured = branch.rule_state, step.measured() if step.computes else None
        known = state is not None or measured is not None
        tensor = self.strategy.metric(state or (), measured) if known else None
        if tensor is None:
            return None
        return float(tensor) if tensor.device.type == "cpu" else tensor.clone()

    def _warn_starved(
        self, start: CallStart, fits: bool, arguments: Callable[[], Sequence[str]]
    ) -> None:
        """Warn if calls keep computing because no state fits them."""
        session, placed, step = start
        if step.why != MISSING:
            session.starved = 0
            return
        known = any(b.key == placed.call.key and b is not placed.branch for b in session.branches)
        session.starved = session.starved + 1 if known else 0
        if not fits:
            self.warn_once(_CROWDED)
        elif session.starved >= _STARVED:
            self.warn_once(_starved(placed.call, arguments()))

    def _warn_captured(self, start: CallStart, captured: object) -> None:
        """Warn if each call of a generation is captured: then none can reuse anything."""
        session = start.session
        again = captured is not None and start.placement.index > 0
        session.captured = session.captured + 1 if again else 0
        if session.captured == _CAPTURED:
            self.warn_once(
                f"each of the last {_CAPTURED} calls needed a new capture, since shapes or "
                f"arguments that are no tensors change ({captured}). Pass values that change from "
                "step to step as tensors"
            )


def _signed(lowered: Lowered) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that combines the checksums of all processes' parts."""
    ranks = lowered.strategy.ranks
    return None if ranks is None else ranks.signed


def _probe(lowered: Lowered, sample: torch.Tensor) -> SampleProbe:
    """Return a probe of the sample: of all processes' samples if each has its own."""
    probe, ranks = SampleProbe(sample), lowered.strategy.ranks
    if ranks is None:
        return probe
    padded = probe.padded()
    if lowered.sample_apart is None:
        lowered.sample_apart = ranks.own_calls or probe.plain or ranks.differ(padded)
    return SampleProbe.of(ranks.gathered(padded)) if lowered.sample_apart else probe


def _starved(call: CallEvidence, arguments: Sequence[str]) -> str:
    named = ", ".join(dict.fromkeys(arguments)) or "none"
    return (
        f"no state fits the last {_STARVED} calls: the conditioning of the blocks ({named}) has "
        "other values in each call, or several requests with the same conditioning alternate. "
        "Call each request in a session (with cached.new_session():) and each of its branches in "
        "a cache_context(name), or pass unchanged values as the same tensors"
    )


def _read(fields: tuple[Any, ...], measured: Measured) -> StepRecord:
    return StepRecord(*fields, *(() if measured is None else (float(measured),)))
