"""The bookkeeping of a cached model's calls: steps, branches, and what was done on each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dit_cache_fx.errors import warn
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.hooked import NO_HOOKS, Hooked
from dit_cache_fx.runtime.matching import CallEvidence
from dit_cache_fx.runtime.placement import Placement, place
from dit_cache_fx.runtime.session import MAX_BRANCHES, Session
from dit_cache_fx.runtime.step import MISSING, Step
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.timestep_value import TimestepValue, as_number, timestep_value
from dit_cache_fx.runtime.tracker import Tracker
from dit_cache_fx.runtime.trajectory import SampleProbe
from dit_cache_fx.strategies import Course, Strategy
from dit_cache_fx.values.host_copies import HostCopies, is_on_host
from dit_cache_fx.values.identity import TensorIdentity

_CROWDED = (
    f"more than {MAX_BRANCHES} branches are called in a step, and no more are held in one session: "
    "the others compute on every step. Put them into one batch, or give each a session of its own "
    "(cached.new_session())"
)

#: so many calls on end without state are no beginning any more
_STARVED = 8
#: so many calls on end that are captured are none either
_CAPTURED = 10

#: why a call runs uncached while autograd is on
WANTS_GRADIENTS = (
    "gradients are enabled and wanted (call the model under torch.no_grad() or "
    "torch.inference_mode())"
)

Measured = torch.Tensor | float | None

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One call in the last generation.

    Attributes:
        step (`int`):
            The step, counted from 0.
        timestep (`float`):
            The timestep of the call.
        branch (`int`):
            The number of the branch among those of the same graph and context.
        action (`str`):
            "computed", "reused" or "predicted".
        why (`str`, defaults to `""`):
            The reason why it computed.
        graph (`int`, defaults to `0`):
            The number of the captured graph.
        context (`str`, *optional*):
            The cache context; nested ones are joined by "/".
        measured (`float`, *optional*):
            The number that the strategy's own rule compared when it decided.
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


class CallStart(NamedTuple):
    """A call that is under way: its session, its place there and its step."""

    session: Session
    placement: Placement
    step: Step


class CallLog:
    """What one cached model knows of its calls, whatever graphs answer them."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.count = StepCount(strategy)
        self.tracker = Tracker(self.count)
        self.calls = {"computed": 0, "reused": 0}
        self._copies = HostCopies()
        self._warned: set[str] = set()

    @property
    def course(self) -> Course | None:
        """What is known of the newest generation's steps; None before the first call."""
        newest = self.tracker.session.newest
        return None if newest is None else newest.course

    @property
    def num_steps(self) -> int | None:
        """How many steps the newest generation is expected to have; None where not known."""
        course = self.course
        return None if course is None else course.num_steps

    def forget_calls(self) -> None:
        """Forget what the calls were."""
        for session in self.tracker.sessions():
            session.records.clear()
        self.calls = {"computed": 0, "reused": 0}

    def warn_once(self, reason: str) -> None:
        """Warn that a call is not cached, with each reason once."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn(f"not cached: {reason}")

    # --- a call ------------------------------------------------------------------------------

    def read(self, timestep: torch.Tensor) -> TimestepValue:
        """The values of a timestep tensor.

        Waits for the device where it is on one, unless it is a part of a tensor that was read.
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
        """What tells where a call belongs. `key`: of its signature; `tensors`: the call's own.

        A tensor that is passed as the sample and as something else moves as the sample does.
        """
        sample = None if lowered.sample is None else tensors[lowered.sample]
        places = [i for i in lowered.conditioning if tensors[i] is not sample]
        return CallEvidence(
            key=(key, *[lowered.program.inputs[i] for i in places]),
            serial=lowered.serial,
            context=self.tracker.context,
            value=value,
            explicit=session.explicit is not None,
            conditioning=TensorIdentity([tensors[i] for i in places], _signed(lowered)),
            sample=None if sample is None else _probe(lowered, sample),
            derived=derived,
            hooked=hooked,
        )

    def begin(
        self,
        session: Session,
        call: CallEvidence,
        lowered: Lowered,
        shapes: object = (),
    ) -> CallStart:
        """Find the place and the step of a call; nothing is noted before `done`.

        `lowered`: its graph. `shapes`: of the masked selections that what it holds comes from; what
        is held of others is not used.
        """
        placed = place(session, call, self.count)
        if placed.branch.shapes != shapes:
            emptied = replace(placed.branch.emptied(), shapes=shapes)
            placed = replace(placed, branch=emptied, replaced=placed.replaced or placed.branch)
        held = lowered.variants.held
        step = Step(
            lowered.strategy, placed.branch, placed.index, held, placed.course, placed.missed
        )
        return CallStart(session, placed, step)

    def done(
        self,
        start: CallStart,
        arguments: Callable[[], Sequence[str]],
        captured: object = None,
    ) -> None:
        """The call has succeeded.

        `arguments`: the names of those that are its conditioning. `captured`: why a graph was
        captured for it, if one was.
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
        """The model itself has answered a call: it counts as a step that the cache did not see."""
        placed = place(session, call, self.count)
        placed.settle(session, answered=False)

    def records(self) -> list[StepRecord]:
        """The last generation's calls. Reads what the rule measured from its device."""
        return [_read(*noted) for noted in self.tracker.reported.records]

    def _noted(self, start: CallStart) -> tuple[Any, ...]:
        """The first fields of a `StepRecord`: most calls are never reported."""
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
        """As a number where that waits for no device; else a copy, since state may be cleared."""
        state, measured = branch.memory, step.measured() if step.computes else None
        known = state is not None or measured is not None
        tensor = self.strategy.metric(state or (), measured) if known else None
        if tensor is None:
            return None
        return float(tensor) if tensor.device.type == "cpu" else tensor.clone()

    def _warn_starved(
        self, start: CallStart, fits: bool, arguments: Callable[[], Sequence[str]]
    ) -> None:
        """Warn where calls compute, and go on doing so, for want of state."""
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
        """Warn where call after call of a generation is captured: none can reuse anything."""
        session = start.session
        again = captured is not None and start.placement.index > 0
        session.captured = session.captured + 1 if again else 0
        if session.captured == _CAPTURED:
            self.warn_once(
                f"each of the last {_CAPTURED} calls was captured anew, since shapes or arguments "
                f"that are no tensors change ({captured}). Pass what changes from step to step as "
                "a tensor"
            )


def _signed(lowered: Lowered) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Makes checksums of parts those of the whole, the same in all processes."""
    ranks = lowered.strategy.ranks
    return None if ranks is None else ranks.signed


def _probe(lowered: Lowered, sample: torch.Tensor) -> SampleProbe:
    """Of all processes' samples where each has its own: a part of one, or another one."""
    probe, ranks = SampleProbe(sample), lowered.strategy.ranks
    if ranks is None:
        return probe
    padded = probe.padded()
    if lowered.sample_apart is None:
        lowered.sample_apart = probe.plain or ranks.differ(padded)
    return SampleProbe.of(ranks.gathered(padded)) if lowered.sample_apart else probe


def _starved(call: CallEvidence, arguments: Sequence[str]) -> str:
    named = ", ".join(dict.fromkeys(arguments)) or "none"
    return (
        f"the last {_STARVED} calls found nothing that is known to be theirs: what conditions the "
        f"blocks ({named}) has other values in each call, or samples of several requests come in "
        "turn with one conditioning. Call each request in a session (with cached.new_session():) "
        "and each of its branches in a cache_context(name), or pass what does not change as the "
        "same tensors"
    )


def _read(fields: tuple[Any, ...], measured: Measured) -> StepRecord:
    return StepRecord(*fields, *(() if measured is None else (float(measured),)))
