"""Everything behind a cached model: finds the graph, the step and the branch of each call."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from dit_cache_fx.capture import (
    CAPTURING,
    Captured,
    FlatCall,
    Subject,
    accepts,
    can_replay,
    capture,
    flatten_call,
    named_timestep,
    replayed,
)
from dit_cache_fx.capture.fingerprint import Fingerprint, fingerprint, volatile
from dit_cache_fx.errors import CaptureError, DitCacheWarning, OptionError
from dit_cache_fx.identity import Seen
from dit_cache_fx.lowering import lower_eager
from dit_cache_fx.passes import run_passes
from dit_cache_fx.program import device_of, operations, spec_of
from dit_cache_fx.runtime.branches import MAX_BRANCHES, Branch, Session
from dit_cache_fx.runtime.report import StepRecord
from dit_cache_fx.runtime.step import HeldSpec, Step
from dit_cache_fx.runtime.steps import Generation, Moment, timestep_value
from dit_cache_fx.strategies import ALIASES, Strategy
from dit_cache_fx.structure import flatten, unflatten

#: most input signatures whose graphs, and generations whose tensors, are kept at one time
MAX_CAPTURES = 32
MAX_SESSIONS = 8
#: most captures of one signature: more means that its guards depend on what changes every step
MAX_VARIANTS = 8

_CROWDED = (
    f"more than {MAX_BRANCHES} calls with one timestep are not told apart: every step is computed. "
    "Name each branch (cache_context), or put them into one batch"
)

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """A captured and lowered graph."""

    captured: Captured
    lowered: fx.GraphModule
    held: dict[int, HeldSpec]
    nodes: int
    fingerprint: Fingerprint
    volatile: frozenset[tuple[str, str]]  # what of it the forward changes by itself
    timestep: int  # which of the call's tensors
    conditioning: tuple[int, ...]  # those that are neither the timestep nor the sample
    serial: int
    served: set[float] = field(default_factory=set)  # a few of the timesteps that it answered


class SessionKey(NamedTuple):
    """What a generation is told apart by: its input signature, the graph, the cache context."""

    inputs: Hashable
    serial: int
    context: str | None


class Engine:
    """Answers the calls of one cached model."""

    def __init__(self, subject: Subject, timestep: str | None) -> None:
        self.subject = subject
        self.strategy = subject.strategy
        self.timestep = timestep
        self.explicit: int | None = None
        self.context: str | None = None
        self.entries: OrderedDict[Hashable, list[Entry]] = OrderedDict()
        self.sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self.timeline: deque[StepRecord] = deque(maxlen=4096)
        self.calls = {"computed": 0, "reused": 0}
        self._newest: Generation | None = None
        self._noted: Generation | None = None  # the one whose steps are in the timeline
        self._serial = 0
        self._warned: set[str] = set()

    # --- life cycle --------------------------------------------------------------------------

    def clear_states(self) -> None:
        """Forget what is held and where the generation stands; keep the graphs."""
        self.sessions.clear()
        self.explicit = None
        self._newest = None

    def reset_states(self) -> None:
        """Forget everything, graphs and counts included."""
        self.clear_states()
        self.entries.clear()
        self.timeline.clear()
        self.calls = {"computed": 0, "reused": 0}

    @property
    def current_step(self) -> int:
        """The step index of the newest call, 0 before the first."""
        return self._newest.moment.index if self._newest is not None else 0

    # --- a call ------------------------------------------------------------------------------

    # not compiled yet: eager behind a graph break
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self.subject.signature.bind(args, kwargs)
        if self.timestep is None:  # it may have come in by **kwargs
            self.timestep = named_timestep(tuple(arguments), None)
        call = flatten_call(arguments, self.timestep)
        key = self._key(call)
        entry, first = self._entry(call, key)
        value = self._value(call, entry)
        session = self._session(SessionKey(key, entry.serial, self.context))
        with session.restored_on_error():
            generation = self._generation(session, value)
            step, branch = self._begin(session, call, entry)
            if step.computes and not first and self._stale(entry):
                self.reset_graphs()
                return self(args, kwargs)
            output = self._run(entry, step, call, first)
        self._newest = generation
        if len(entry.served) < 2:
            entry.served.add(value)
        self._note(step, value, session, branch)
        return output

    def reset_graphs(self) -> None:
        """The model has changed: capture anew, hold nothing."""
        log.info("the model has changed since it was captured: capturing again")
        self.entries.clear()
        self.sessions.clear()

    def _run(self, entry: Entry, step: Step, call: FlatCall, first: bool) -> Any:
        replay = first and can_replay(entry.captured)
        with torch.no_grad(), replayed(entry.captured) if replay else nullcontext():
            tensors = entry.lowered(step, *call.tensors)
        if first:
            self._check_answer(entry, tensors)
        return unflatten(entry.captured.program.output, step.commit(call.tensors, tensors))

    def _check_answer(self, entry: Entry, tensors: list[torch.Tensor]) -> None:
        recording = entry.captured.recording
        expected = flatten(recording.output)[0]
        recording.output = None
        for made in recording.calls:
            made.values.clear()
        if not self.subject.check:
            return
        for want, got in zip(expected, tensors, strict=True):
            if not torch.equal(want.nan_to_num(), got.nan_to_num()):
                self.entries.clear()
                raise CaptureError(
                    "the captured graph does not give the model's output for the call that it was "
                    "captured from: a layer around the blocks is random or keeps a state. Pass "
                    "check=False if that is wanted"
                )

    def warn_once(self, reason: str) -> None:
        """Warn that a call is not cached, with each reason once."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"not cached: {reason}", DitCacheWarning, stacklevel=6)

    # --- graphs ------------------------------------------------------------------------------

    def _entry(self, call: FlatCall, key: Hashable) -> tuple[Entry, bool]:
        entries = self.entries.setdefault(key, [])
        self.entries.move_to_end(key)
        for entry in reversed(entries):
            if accepts(self.subject, entry.captured, call):
                entries.remove(entry)
                entries.append(entry)  # the newest is the last
                return entry, False
        if len(entries) >= MAX_VARIANTS:
            _refuse_one_for_each_step(entries)
            entries.pop(0)
        try:
            with CAPTURING:
                entries.append(self._capture(call))
        finally:
            if not entries:
                self.entries.pop(key, None)
        while len(self.entries) > MAX_CAPTURES:
            self.entries.popitem(last=False)
        return entries[-1], True

    def _key(self, call: FlatCall) -> Hashable:
        device = call.tensors[0].device.type if call.tensors else "cpu"
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return call.key, autocast

    def _capture(self, call: FlatCall) -> Entry:
        before = fingerprint(self.subject.model, ())
        captured = capture(self.subject, call, self.timestep)
        after = fingerprint(self.subject.model, ())
        program = captured.program
        self.timestep = program.arguments[program.inputs.index(str(program.timestep))]
        check_block_ids(self.strategy, program.block_lists)
        nodes = operations(program.graph)
        run_passes(program, self.strategy)
        self._serial += 1
        moving = (program.sample, self.timestep)
        places = [i for i, a in enumerate(program.arguments) if a not in moving]
        return Entry(
            captured,
            lower_eager(program),
            {r.index: _held_spec(captured, r.values, self.strategy) for r in program.regions},
            nodes,
            fingerprint(self.subject.model, captured.whole),
            volatile(before, after),
            program.inputs.index(str(program.timestep)),
            tuple(places),
            self._serial,
        )

    def _stale(self, entry: Entry) -> bool:
        now = fingerprint(self.subject.model, entry.captured.whole)
        changed = volatile(entry.fingerprint, now) - entry.volatile
        if changed:
            log.info("changed since the capture: %s", sorted(changed))
        return bool(changed)

    # --- steps and branches --------------------------------------------------------------------

    def _value(self, call: FlatCall, entry: Entry) -> float:
        if self.explicit is not None:
            return float(self.explicit)
        return timestep_value(call.tensors[entry.timestep])

    def _session(self, key: SessionKey) -> Session:
        session = self.sessions.setdefault(key, Session())
        self.sessions.move_to_end(key)
        while len(self.sessions) > MAX_SESSIONS:
            self.sessions.popitem(last=False)
        return session

    def _generation(self, session: Session, value: float) -> Generation:
        """Move the session to this call's generation and moment.

        A session without a generation, or whose own has ended, joins the newest one when the value
        fits: it is another branch (with other text, say) of a step under way.
        """
        explicit = self.explicit is not None
        for generation in (session.generation, self._newest):
            if generation is None:
                continue
            moment = generation.moment.advanced(value, explicit)
            joins = generation is session.generation or generation.takes(value, explicit)
            if moment is not None and joins:
                if session.enter(generation, moment):
                    self.warn_once(_CROWDED)
                return generation
        fresh = Generation(Moment(value, explicit=explicit))
        session.enter(fresh, fresh.moment)
        return fresh

    def _begin(self, session: Session, call: FlatCall, entry: Entry) -> tuple[Step, Branch]:
        branch = session.branch_of(Seen([call.tensors[i] for i in entry.conditioning]))
        if branch.shapes != entry.captured.shapes:
            branch.forget()
            branch.shapes = entry.captured.shapes
        assert session.moment is not None
        return Step(self.strategy, branch, session.moment.index, entry.held), branch

    def _note(self, step: Step, value: float, session: Session, branch: Branch) -> None:
        action = "computed" if step.computes else self.strategy.action
        if session.generation is not self._noted:
            self.timeline.clear()
            self._noted = session.generation
        place = next(i for i, b in enumerate(session.branches) if b is branch)
        self.timeline.append(StepRecord(step.index, value, place, action))
        self.calls["computed" if step.computes else "reused"] += 1
        log.debug("step %d (timestep %g, branch %d): %s", step.index, value, place, action)


def _refuse_one_for_each_step(entries: Sequence[Entry]) -> None:
    """Raise where every capture answered one step only: their guards change with the step."""
    if all(len(entry.served) <= 1 for entry in entries):
        guards = entries[-1].captured.guards
        raise CaptureError(
            f"{len(entries)} captures of the same inputs have guards of different values: the "
            "model's own code (outside its blocks and layers) reads a value that changes from "
            f"step to step, such as the timestep's. Last: {guards and guards.expected}"
        )


def check_block_ids(
    strategy: Strategy, lists: dict[str, int], aliases: dict[str, int] | None = None
) -> None:
    """Raise `OptionError` where `no_cache_block_id` names a list or block that is not there.

    `lists`: name -> number of blocks, in call order. `aliases`: the same for "double_blocks" and
    "single_blocks" where the order is not known yet.
    """
    names = list(lists)
    sizes = {**(aliases or dict(zip(ALIASES, lists.values(), strict=False))), **lists}
    for name, ids in (strategy.no_cache_block_id or {}).items():
        if name not in sizes:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(ids)},
                f"no block list of that name; the lists are {names} "
                f"(or {list(ALIASES)[: len(names)]} in call order)",
            )
        beyond = sorted(i for i in ids if i >= sizes[name])
        if beyond:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(ids)},
                f"{name} has {sizes[name]} blocks, ids 0 to {sizes[name] - 1}; got {beyond}",
            )


def _held_spec(captured: Captured, values: tuple[str, ...], strategy: Strategy) -> HeldSpec:
    shapes = []
    for name in values:
        node = captured.program.node(name)
        spec = spec_of(node)
        assert spec is not None
        shapes.append((spec.shape, spec.dtype, device_of(node)))
    return HeldSpec(len(values), tuple(shapes), strategy.slots())


def requires_grad(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether autograd is on and something here takes part in it."""
    if not torch.is_grad_enabled():
        return False
    if any(p.requires_grad for p in model.parameters()):
        return True
    return any(t.requires_grad for t in flatten((args, kwargs))[0])
