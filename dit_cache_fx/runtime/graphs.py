"""The captured graphs of one cached model: find, capture, drop."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import nn

from dit_cache_fx.capture import FlatCall, Shapes, Subject, accepts, capture, named_timestep
from dit_cache_fx.capture.fingerprint import fingerprint, volatile
from dit_cache_fx.errors import CaptureError, warn
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.nodes import operations
from dit_cache_fx.lowering import lower_variants
from dit_cache_fx.lowering.lowered_program import block_bytes
from dit_cache_fx.passes import run_passes
from dit_cache_fx.ranks import found
from dit_cache_fx.runtime.batch.row_steps import RowLayout
from dit_cache_fx.runtime.entry import Entry, GraphKey, RowsOf
from dit_cache_fx.runtime.reasons import WhyCaptured, changes
from dit_cache_fx.runtime.tracking.hooks import Hooks
from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.strategies import check_block_ids, spread_over

#: the largest number of input signatures with graphs
MAX_CAPTURES = 32
#: the same for signatures of batched rows: several batch sizes for each of those
MAX_GROUPS = 4 * MAX_CAPTURES
#: the largest number of captures of one signature: beyond it, guards depend on changing values
MAX_VARIANTS = 8

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(eq=False)
class Found(Generic[_T]):
    """The graph for a call. `first`: its answer to that call, if it was captured just now."""

    entry: Entry
    shapes: Shapes  # of the call's masked selections
    first: _T | None
    because: object = ""  # the reason for the capture, as text


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
        self.keep_programs = False  # keep programs before the passes, for other strategies
        self._serial = 0
        #: key and entries of the newest call, the newest entry last: most calls need no lookup
        self._newest: tuple[GraphKey, tuple[Entry, ...]] | None = None
        self._told: set[str] = set()
        self._capturing = threading.RLock()
        self._lock = threading.RLock()  # for `entries`, held briefly

    def clear(self) -> None:
        """Forget every graph."""
        with self._lock:
            self.entries.clear()
            self._newest = None

    def outdated(self, entry: Entry) -> bool:
        """Forget every graph, unless this one was forgotten; return whether it was still known."""
        with self._lock:
            known = any(entry is e for e in self.all())
            if known:
                self.clear()
            return known

    def learn_timestep(self, arguments: Iterable[str]) -> None:
        """Look for the timestep among a call's arguments: it may be in `**kwargs`."""
        if self.timestep_argument is None:
            self.timestep_argument = named_timestep(tuple(arguments), None)

    def find(
        self,
        call: FlatCall,
        key: GraphKey,
        check: Callable[[Entry], _T],
        rows: RowsOf | None = None,
    ) -> Found[_T]:
        """Return the graph for a call; capture it if there is none. `rows`: the rows of the graph.

        A new graph is passed to `check`, which returns its answer to the call or raises; before
        that no other call sees the graph.
        """
        found: Found[_T] | None = self._accepting(call, key)
        if found is not None:
            return found
        with self._capturing:
            found = self._accepting(call, key)  # another thread may have captured it
            return self._captured(call, key, check, rows) if found is None else found

    def _accepting(self, call: FlatCall, key: GraphKey) -> Found[_T] | None:
        newest = self._newest
        again = newest is not None and newest[0] == key
        entries = newest[1] if again else self.entries.get(key, ())  # type: ignore[index]
        for entry in reversed(entries):
            shapes = accepts(self.subject, entry.captured, call)
            if shapes is not None:
                if not again or entry is not entries[-1]:
                    self._used(key, entry)
                return Found(entry, shapes, None)
        return None

    def _used(self, key: GraphKey, entry: Entry) -> None:
        """Move an entry to the end: the newest is the last."""
        with self._lock:
            entries = self.entries.get(key, ())
            if entry in entries:  # otherwise another thread has forgotten it
                self.entries[key] = (*(e for e in entries if e is not entry), entry)
                self.entries.move_to_end(key)
                self._newest = key, self.entries[key]

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
        with self.subject.turns.of_model():  # now it is known whether forward sets attributes
            first = check(entry)
        self.keep(key, entry, MAX_CAPTURES if rows is None else MAX_GROUPS)
        guards = entry.captured.guards
        shapes = () if guards is None else guards.shapes(guards.expected)
        return Found(entry, shapes, first, because)

    def keep(self, key: GraphKey, entry: Entry, most: int = MAX_CAPTURES) -> None:
        """Keep a graph as the newest of its signature; drop the oldest beyond `most` of a kind."""
        with self._lock:
            self.entries[key] = (*self.entries.get(key, ())[1 - MAX_VARIANTS :], entry)
            self.entries.move_to_end(key)
            self._newest, entry.key = (key, self.entries[key]), key
            self._bound(type(key), most)

    def _bound(self, kind: type, most: int) -> None:
        """Drop the oldest graphs whose keys are of this kind."""
        keys = [key for key in self.entries if type(key) is kind]
        for key in keys[: max(len(keys) - most, 0)]:
            del self.entries[key]

    def all(self) -> list[Entry]:
        """Return every graph, the newest last."""
        with self._lock:
            return [entry for variants in self.entries.values() for entry in variants]

    def known(self, call_key: Hashable) -> Entry | None:
        """Return the newest graph for calls of this key, whatever guards and torch's state say."""
        entries = list(self.entries.items())  # without the lock: Dynamo traces this
        found = [v for (key, _), v in entries if key == call_key]
        return found[-1][-1] if found else None

    def carried(self, context: tuple[str, ...]) -> nn.ModuleDict:
        """Return each graph with the state of a cache context in its buffers."""
        calls = [entry for entry in self.all() if entry.layout is None]
        return nn.ModuleDict({str(e.serial): e.carried_in(context) for e in calls})

    def forget_carried(self) -> None:
        """Reset the state in buffers to that before the first call."""
        for entry in self.all():
            for carried in entry.carried.values():
                carried.forget()

    def stale(self, entry: Entry) -> bool:
        """Return whether the model has changed since the capture."""
        captured = entry.captured
        now = fingerprint(self.subject.model, captured.whole, captured.blocks)
        changed = volatile(entry.fingerprint, now) - entry.volatile
        if changed:
            text = changes(changed, entry.fingerprint, now)
            log.info("the model has changed since the capture: %s", text)
        return bool(changed)

    def _tell_unread(self, unread: Sequence[str]) -> None:
        """Warn once of each attribute that forward sets for other code: a cached call does not."""
        for attribute in unread:
            if attribute not in self._told:
                self._told.add(attribute)
                warn(
                    f"the model's forward sets {attribute} in each call and never reads it: "
                    "cached calls leave it as it was at capture"
                )

    def _capture(self, call: FlatCall, rows: RowsOf | None) -> Entry:
        model, strategy = self.subject.model, self.subject.strategy
        strategy = spread_over(strategy, found(model, call.tensors))
        before = fingerprint(model)
        captured = capture(replace(self.subject, strategy=strategy), call, self.timestep_argument)
        if captured.recording.settings and not self.subject.turns.needed:
            self.subject.turns.needed = True
            self.clear()  # graphs of before do not look at what forward sets
        self._tell_unread(captured.unread)
        after = fingerprint(model)
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
            fingerprint(model, captured.whole, captured.blocks),
            volatile(before, after),
            self.count,
            call.skeleton,
            hooks=Hooks(model),
            untouched=untouched,
        )
        entry.apart = captured.spread  # `cond` takes no DTensors
        entry.layout = None if rows is None else RowLayout.of(rows.one, entry, rows.count)
        log.info("captured %s", entry)
        return entry


def _refuse_one_for_each_step(entries: Sequence[Entry]) -> None:
    """Raise if every capture answered one step only: their guards change with the step."""
    if all(len(entry.served) <= 1 for entry in entries):
        guards = entries[-1].captured.guards
        raise CaptureError(
            f"{len(entries)} captures of the same inputs have guards with different values: the "
            "model's own code (outside its blocks and layers) reads a value that changes from "
            f"step to step, such as the timestep's. Last: {guards and guards.expected}"
        )
