"""The captured graphs of one cached model: found again, captured anew, dropped."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import fx, nn

from dit_cache_fx._torch import constant_result, not_a_compiled_frame
from dit_cache_fx.capture import (
    Captured,
    FlatCall,
    Shapes,
    Subject,
    accepts,
    capture,
    named_timestep,
)
from dit_cache_fx.capture.ambient import Ambient
from dit_cache_fx.capture.fingerprint import Fingerprint, fingerprint, volatile
from dit_cache_fx.capture.record import Recording
from dit_cache_fx.errors import CaptureError, warn
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.program import Program, operations
from dit_cache_fx.lowering import (
    CompiledSteps,
    OneGraph,
    lower_compiled_steps,
    lower_one_graph,
    lower_variants,
)
from dit_cache_fx.lowering.asserts import assertions
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.lowering.stateful import Carried, Stateful, fixed_steps
from dit_cache_fx.passes import run_passes
from dit_cache_fx.ranks import found
from dit_cache_fx.runtime.first_runs import FirstRuns
from dit_cache_fx.runtime.hooked import Hooks
from dit_cache_fx.runtime.reasons import WhyCaptured, changes
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.together import Layout
from dit_cache_fx.strategies import Strategy, check_block_ids, spread_over
from dit_cache_fx.values.pytree import Skeleton

#: most input signatures whose graphs are kept at one time
MAX_CAPTURES = 32
#: most such signatures of rows that are answered together: several sizes for each of those
MAX_GROUPS = 4 * MAX_CAPTURES
#: most captures of one signature: more means that its guards depend on what changes every step
MAX_VARIANTS = 8

log = logging.getLogger(__name__)

#: what two calls must share to run the same graph
InputKey = tuple[Hashable, Ambient]


class RowsKey(NamedTuple):
    """What two groups of rows must share. `one`: the number of the graph for a row by itself."""

    call: InputKey
    one: int


GraphKey = InputKey | RowsKey


_T = TypeVar("_T")


@dataclass(eq=False)
class Entry(Lowered):
    """A captured and lowered graph."""

    captured: Captured
    fingerprint: Fingerprint
    volatile: frozenset[tuple[str, str]]  # what of it the forward changes by itself
    count: StepCount
    skeleton: Skeleton  # of the call that it was captured from
    hooks: Hooks
    untouched: Program | None = None  # before the passes, where other strategies need it
    breaks: bool = False  # its blocks cannot be compiled as one graph
    apart: bool = False  # it was compiled as one graph for each kind of step
    carried: dict[tuple[str, ...], Carried] = field(default_factory=dict)  # by cache context
    layout: Layout | None = None  # of its rows, where each is at a step of its own
    served: set[float] = field(default_factory=set)  # a few of the timesteps that it answered
    first_runs: FirstRuns = field(default_factory=FirstRuns)  # with each compiler that looks on
    _lowering: threading.RLock = field(default_factory=threading.RLock)
    _one_graph: OneGraph | None = None
    _compiled_steps: CompiledSteps | None = None
    key: GraphKey | None = None  # one object for all its calls: to compare it costs nothing

    def lowered_for(self, strategy: Strategy, count: StepCount) -> Entry:
        """The same capture, lowered for another strategy that reads the same of the model."""
        assert self.untouched is not None
        program = self.untouched.copied()
        run_passes(program, strategy)
        return Entry(
            program,
            lower_variants(program),
            self.nodes,
            self.block_bytes,
            self.serial,
            strategy,
            replace(self.captured, program=program),
            self.fingerprint,
            self.volatile,
            count,
            self.skeleton,
            self.hooks,
        )

    def guards(self) -> list[str]:
        guards = self.captured.guards
        return [] if guards is None else guards.described(guards.expected)

    def captured_graph(self) -> fx.GraphModule:
        return self.captured.gm

    @property
    def one_graph(self) -> OneGraph:
        """The graph that decides by itself."""
        with self._lowering:
            if self._one_graph is None:
                self._one_graph = lower_one_graph(self.program, self.variants, self.strategy)
            return self._one_graph

    @property
    def compiled_steps(self) -> CompiledSteps:
        """The graphs of each kind of step."""
        with self._lowering:
            if self._compiled_steps is None:
                self._compiled_steps = lower_compiled_steps(self.variants)
            return self._compiled_steps

    def broken(self) -> None:
        """Its blocks cannot be in one graph: let the compiler look at each of them by itself."""
        self.breaks = True
        not_a_compiled_frame(self.variants.compute.run)

    def inputs(self, call: FlatCall) -> dict[str, torch.Tensor]:
        """The tensors of a call by the names that the graphs have for them."""
        return dict(zip(self.program.inputs, call.tensors, strict=True))

    def stateful(self, check_conditioning: bool = True) -> Stateful:
        """The program with its clock, its state given and returned."""
        names = [self.program.inputs[i] for i in self.conditioning] if check_conditioning else []
        guards, accepted = self.captured.guards, self.captured.accepted.copy()
        asserted = None if guards is None else assertions(guards, accepted)
        course = self.count.lasting_course()
        steps = fixed_steps(self.strategy, course.num_steps, course.timesteps)
        return Stateful(self.program, self.variants, self.strategy, asserted, names, steps, course)

    def carried_in(self, context: tuple[str, ...]) -> Carried:
        """The program with the state of a cache context in its buffers."""
        return getattr(self, self._carry(context))  # type: ignore[no-any-return]

    @constant_result
    def _carry(self, context: tuple[str, ...]) -> str:
        """The name of the attribute that holds it: made while a graph is traced, where need be."""
        with self._lowering:
            if context not in self.carried:
                self.carried[context] = Carried(self.stateful())
            name = f"_carried_{[*self.carried].index(context)}"
            setattr(self, name, self.carried[context])
            return name


@dataclass(frozen=True)
class RowsOf:
    """What a graph has rows of: calls that `one` answers by themselves, `count` of them."""

    one: Entry
    count: int


@dataclass(eq=False)
class Found(Generic[_T]):
    """The graph for a call. `first`: where it was captured just now, its answer to that call."""

    entry: Entry
    shapes: Shapes  # of the call's masked selections
    first: _T | None
    because: object = ""  # why it was captured, as text


class Graphs:
    """Every captured graph of one model, by input signature.

    Threads capture one at a time, so that each graph is made once. Calls of known graphs do not
    wait for that.
    """

    def __init__(self, subject: Subject, timestep_argument: str | None, count: StepCount) -> None:
        self.subject = subject
        self.count = count
        self.timestep_argument = timestep_argument  # once it is known
        self.entries: OrderedDict[GraphKey, tuple[Entry, ...]] = OrderedDict()
        self.keep_programs = False  # as they are before the passes, for other strategies
        self._serial = 0
        self._newest: Entry | None = None  # that answered a call
        self._told: set[str] = set()
        self._capturing = threading.RLock()
        self._lock = threading.RLock()  # of `entries`, held for a moment

    def clear(self) -> None:
        """Forget every graph."""
        with self._lock:
            self.entries.clear()

    def outdated(self, entry: Entry) -> bool:
        """Forget every graph, unless this one was forgotten; returns whether it was there."""
        with self._lock:
            known = any(entry is e for e in self.all())
            if known:
                self.entries.clear()
            return known

    def learn_timestep(self, arguments: Iterable[str]) -> None:
        """Look for the timestep among a call's arguments: it may have come in by `**kwargs`."""
        if self.timestep_argument is None:
            self.timestep_argument = named_timestep(tuple(arguments), None)

    def find(
        self,
        call: FlatCall,
        key: GraphKey,
        check: Callable[[Entry], _T],
        rows: RowsOf | None = None,
    ) -> Found[_T]:
        """The graph for a call, captured where there is none. `rows`: what it has rows of.

        A new graph is given to `check`, which gives its answer to the call or raises; before that
        no other call sees it.
        """
        found: Found[_T] | None = self._accepting(call, key)
        if found is not None:
            return found
        with self._capturing:
            found = self._accepting(call, key)  # captured by another thread meanwhile
            return self._captured(call, key, check, rows) if found is None else found

    def _accepting(self, call: FlatCall, key: GraphKey) -> Found[_T] | None:
        for entry in reversed(self.entries.get(key, ())):
            shapes = accepts(self.subject, entry.captured, call)
            if shapes is not None:
                self._used(key, entry)
                return Found(entry, shapes, None)
        return None

    def _used(self, key: GraphKey, entry: Entry) -> None:
        """The newest is the last."""
        if entry is self._newest:
            return
        with self._lock:
            self._newest = entry
            entries = self.entries.get(key, ())
            if entry in entries:
                self.entries.move_to_end(key)
            if entry in entries[:-1]:
                self.entries[key] = (*(e for e in entries if e is not entry), entry)

    def _captured(
        self,
        call: FlatCall,
        key: GraphKey,
        check: Callable[[Entry], _T],
        rows: RowsOf | None,
    ) -> Found[_T]:
        entries = self.entries.get(key, ())
        if len(entries) >= MAX_VARIANTS:
            _refuse_one_for_each_step(entries)
        newest = next(((e.program, e.skeleton) for e in reversed(self.all())), None)
        because = WhyCaptured(call, len(entries), newest)
        log.info("capturing: %s", because)
        with self.subject.turns.of_model():
            entry = self._capture(call, rows)
        with self.subject.turns.of_model():  # it is known now whether forward sets attributes
            first = check(entry)
        self.keep(key, entry, MAX_CAPTURES if rows is None else MAX_GROUPS)
        guards = entry.captured.guards
        shapes = () if guards is None else guards.shapes(guards.expected)
        return Found(entry, shapes, first, because)

    def keep(self, key: GraphKey, entry: Entry, most: int = MAX_CAPTURES) -> None:
        """Know a graph, the newest of its signature; more than `most` of its kind are dropped."""
        with self._lock:
            self.entries[key] = (*self.entries.get(key, ())[1 - MAX_VARIANTS :], entry)
            self.entries.move_to_end(key)
            self._newest, entry.key = entry, key
            self._bound(type(key), most)

    def _bound(self, kind: type, most: int) -> None:
        """Drop the oldest graphs whose keys are of this kind."""
        keys = [key for key in self.entries if type(key) is kind]
        for key in keys[: max(len(keys) - most, 0)]:
            del self.entries[key]

    def all(self) -> list[Entry]:
        """Every graph, the newest last."""
        with self._lock:
            return [entry for variants in self.entries.values() for entry in variants]

    def known(self, call_key: Hashable) -> Entry | None:
        """The newest graph for calls of this key, whatever its guards and torch's state say."""
        entries = list(self.entries.items())  # without the lock: Dynamo traces this
        found = [v for (key, _), v in entries if key == call_key]
        return found[-1][-1] if found else None

    def carried(self, context: tuple[str, ...]) -> nn.ModuleDict:
        """Each graph with the state of a cache context in its buffers."""
        calls = [entry for entry in self.all() if entry.layout is None]
        return nn.ModuleDict({str(e.serial): e.carried_in(context) for e in calls})

    def forget_carried(self) -> None:
        """Set what is carried in buffers to the state before the first call."""
        for entry in self.all():
            for carried in entry.carried.values():
                carried.forget()

    def stale(self, entry: Entry) -> bool:
        """Whether the model has changed since the capture."""
        now = fingerprint(self.subject.model, entry.captured.whole)
        changed = volatile(entry.fingerprint, now) - entry.volatile
        if changed:
            text = changes(changed, entry.fingerprint, now)
            log.info("the model has changed since the capture: %s", text)
        return bool(changed)

    def _tell_unread(self, unread: Sequence[str]) -> None:
        """Warn of what forward notes for others, once each: a cached call does not."""
        for attribute in unread:
            if attribute not in self._told:
                self._told.add(attribute)
                warn(
                    f"the model's forward sets {attribute} in each call and never reads it: cached "
                    "calls leave it as it was when they were captured"
                )

    def _capture(self, call: FlatCall, rows: RowsOf | None) -> Entry:
        model, strategy = self.subject.model, self.subject.strategy
        strategy = spread_over(strategy, found(model, call.tensors))
        before = fingerprint(model, ())
        captured = capture(replace(self.subject, strategy=strategy), call, self.timestep_argument)
        self.subject.turns.needed |= bool(captured.recording.settings)
        self._tell_unread(captured.unread)
        after = fingerprint(model, ())
        program = captured.program
        self.timestep_argument = program.timestep_argument
        check_block_ids(strategy, program.block_lists)
        nodes = operations(program.graph)
        untouched = program.copied() if self.keep_programs else None
        program.alone = None if rows is None else Alone(rows.count, rows.one.program.values())
        run_passes(program, strategy)
        self._serial += 1
        entry = Entry(
            program,
            lower_variants(program),
            nodes,
            block_bytes(captured.recording, captured.blocks.values()),
            self._serial,
            strategy,
            captured,
            fingerprint(model, captured.whole),
            volatile(before, after),
            self.count,
            call.skeleton,
            hooks=Hooks(model),
            untouched=untouched,
        )
        entry.apart = captured.spread  # `cond` takes no distributed tensors
        entry.layout = None if rows is None else Layout.of(rows.one, entry, rows.count)
        log.info("captured %s", entry)
        return entry


def input_key(call: FlatCall) -> InputKey:
    """What two calls must share to run the same graph, torch's own state included."""
    return call.key, Ambient.now()


def block_bytes(recording: Recording, blocks: Iterable[str]) -> dict[str, int]:
    """Bytes of all results of each of these blocks."""
    found = dict.fromkeys(blocks, 0)
    for call in recording.calls:
        if call.name in found:
            found[call.name] += sum(spec.nbytes for spec in call.specs)
    return found


def _refuse_one_for_each_step(entries: Sequence[Entry]) -> None:
    """Raise where every capture answered one step only: their guards change with the step."""
    if all(len(entry.served) <= 1 for entry in entries):
        guards = entries[-1].captured.guards
        raise CaptureError(
            f"{len(entries)} captures of the same inputs have guards of different values: the "
            "model's own code (outside its blocks and layers) reads a value that changes from "
            f"step to step, such as the timestep's. Last: {guards and guards.expected}"
        )
