"""The captured graphs of one cached model: found again, captured anew, dropped."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn

from dit_cache_fx._torch import not_a_compiled_frame
from dit_cache_fx.capture import (
    CAPTURING,
    Captured,
    FlatCall,
    Subject,
    accepts,
    capture,
    named_timestep,
)
from dit_cache_fx.capture.ambient import Ambient
from dit_cache_fx.capture.fingerprint import Fingerprint, fingerprint, volatile
from dit_cache_fx.capture.record import Recording
from dit_cache_fx.errors import CaptureError, warn
from dit_cache_fx.ir.program import operations, tensor_spec
from dit_cache_fx.lowering import OneGraph, lower_one_graph, lower_variants
from dit_cache_fx.lowering.asserts import assertions
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.lowering.stateful import Carried, Stateful, fixed_steps
from dit_cache_fx.passes import run_passes
from dit_cache_fx.runtime.generation import StepCount
from dit_cache_fx.strategies import Strategy, check_block_ids
from dit_cache_fx.values.tensor_spec import TensorSpec

#: most input signatures whose graphs are kept at one time
MAX_CAPTURES = 32
#: most captures of one signature: more means that its guards depend on what changes every step
MAX_VARIANTS = 8

log = logging.getLogger(__name__)

#: what two calls must share to run the same graph
InputKey = tuple[Hashable, Ambient]


@dataclass(eq=False)
class Entry(Lowered):
    """A captured and lowered graph."""

    captured: Captured
    strategy: Strategy
    fingerprint: Fingerprint
    volatile: frozenset[tuple[str, str]]  # what of it the forward changes by itself
    count: StepCount
    breaks: bool = False  # it cannot be compiled as one graph
    carried: dict[str | None, Carried] = field(default_factory=dict)  # by cache context
    served: set[float] = field(default_factory=set)  # a few of the timesteps that it answered

    def guards(self) -> list[str]:
        guards = self.captured.guards
        return [] if guards is None else guards.described(guards.expected)

    def captured_graph(self) -> fx.GraphModule:
        return self.captured.gm

    @cached_property
    def one_graph(self) -> OneGraph:
        """The graph that decides by itself."""
        return lower_one_graph(self.program, self.variants, self.strategy)

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
        guards, accepted = self.captured.guards, self.captured.accepted
        asserted = None if guards is None else assertions(guards, accepted)
        steps = fixed_steps(self.strategy, self.count.told())
        return Stateful(self.program, self.variants, self.strategy, asserted, names, steps)

    def carried_in(self, context: str | None) -> Carried:
        """The program with the state of a cache context in its buffers."""
        return getattr(self, self._carry(context))  # type: ignore[no-any-return]

    @torch.compiler.assume_constant_result
    def _carry(self, context: str | None) -> str:
        """The name of the attribute that holds it: made while a graph is traced, where need be."""
        if context not in self.carried:
            self.carried[context] = Carried(self.stateful())
        name = f"_carried_{[*self.carried].index(context)}"
        setattr(self, name, self.carried[context])
        return name


class Graphs:
    """Every captured graph of one model, by input signature."""

    def __init__(self, subject: Subject, timestep: str | None, count: StepCount) -> None:
        self.subject = subject
        self.count = count
        self.timestep = timestep  # the argument's name, once it is known
        self.entries: OrderedDict[InputKey, list[Entry]] = OrderedDict()
        self._serial = 0
        self._told: set[str] = set()

    def clear(self) -> None:
        """Forget every graph."""
        self.entries.clear()

    def learn_timestep(self, arguments: Sequence[str]) -> None:
        """Look for the timestep among a call's arguments: it may have come in by `**kwargs`."""
        if self.timestep is None:
            self.timestep = named_timestep(arguments, None)

    def find(self, call: FlatCall, key: InputKey) -> tuple[Entry, bool]:
        """The graph for a call, and whether it was captured just now."""
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
        log.info("capturing: %s", _Because(self.all(), entries, call))
        try:
            with CAPTURING:
                entries.append(self._capture(call))
        finally:
            if not entries:
                self.entries.pop(key, None)
        while len(self.entries) > MAX_CAPTURES:
            self.entries.popitem(last=False)
        return entries[-1], True

    def all(self) -> list[Entry]:
        """Every graph, the newest last."""
        return [entry for variants in self.entries.values() for entry in variants]

    def known(self, call_key: Hashable) -> Entry | None:
        """The newest graph for calls of this key, whatever its guards and torch's state say."""
        found = [v for (key, _), v in self.entries.items() if key == call_key and v]
        return found[-1][-1] if found else None

    def carried(self, context: str | None) -> nn.ModuleDict:
        """Each graph with the state of a cache context in its buffers."""
        return nn.ModuleDict({str(e.serial): e.carried_in(context) for e in self.all()})

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
            log.info("the model has changed since the capture: %s", _changes(changed, entry, now))
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

    def _capture(self, call: FlatCall) -> Entry:
        model, strategy = self.subject.model, self.subject.strategy
        before = fingerprint(model, ())
        captured = capture(self.subject, call, self.timestep)
        self._tell_unread(captured.unread)
        after = fingerprint(model, ())
        program = captured.program
        self.timestep = program.arguments[program.inputs.index(str(program.timestep))]
        check_block_ids(strategy, program.block_lists)
        nodes = operations(program.graph)
        run_passes(program, strategy)
        self._serial += 1
        entry = Entry(
            program,
            lower_variants(program),
            nodes,
            block_bytes(captured.recording, captured.blocks.values()),
            self._serial,
            captured,
            strategy,
            fingerprint(model, captured.whole),
            volatile(before, after),
            self.count,
        )
        log.info("captured %s", entry)
        return entry


def input_key(call: FlatCall) -> InputKey:
    """What two calls must share to run the same graph, torch's own state included."""
    return call.key, Ambient.now()


class _Because:
    """Why a call is captured, as text where it is asked for."""

    def __init__(self, known: Sequence[Entry], same: Sequence[Entry], call: FlatCall) -> None:
        self._known = known
        self._same = same
        self._call = call

    def __str__(self) -> str:
        if self._same:
            return f"none of the {len(self._same)} graphs for such inputs is for this call"
        if not self._known:
            return "the first call"
        program = self._known[-1].program
        was = {name: tensor_spec(program.node(name)) for name in program.inputs}
        now = dict(zip(self._call.names(), map(TensorSpec.of, self._call.tensors), strict=True))
        unlike = [
            f"{name} is {now.get(name)}, was {was.get(name)}"
            for name in dict.fromkeys((*now, *was))
            if now.get(name) != was.get(name)
        ]
        return "another signature: " + (
            "; ".join(unlike)
            or "an argument that is no tensor has another value, or torch another state (autocast)"
        )


def _changes(changed: Iterable[tuple[str, str]], entry: Entry, now: Fingerprint) -> str:
    before = entry.fingerprint
    return "; ".join(
        f"{what} of {path.lstrip('.') or 'the model'}: {before.get((path, what))!r} -> "
        f"{now.get((path, what))!r}"
        for path, what in sorted(changed)
    )


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
