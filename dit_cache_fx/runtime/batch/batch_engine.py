"""Answer calls whose rows belong to different requests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dit_cache_fx.capture import FlatCall, flatten_call
from dit_cache_fx.lowering import Variants
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.batch.row_check import check_rows
from dit_cache_fx.runtime.batch.row_groups import Group, Row, answer, decide, output
from dit_cache_fx.runtime.drive import Compiler, Serving
from dit_cache_fx.runtime.entry import Entry, InputKey, RowsKey, RowsOf, input_key
from dit_cache_fx.runtime.graphs import Found
from dit_cache_fx.values.rows import CallRows

#: the largest number of kinds of calls that are known to split into rows
MAX_CHECKED = 1024

if TYPE_CHECKING:
    from dit_cache_fx.runtime.engine import Engine, First


class BatchEngine:
    """Answers each row as in a call by itself; runs rows with equal actions as one batch.

    Each row's state is in its session, as for a call by itself: a request may leave a batch and
    join another one at any step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._checked: set[Hashable] = set()

    def forget(self) -> None:
        """Forget which calls can be split."""
        self._checked.clear()

    def serve(
        self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler
    ) -> Serving:
        """Answer a call. Records nothing if it raises."""
        engine = self._engine
        rows = batch.rows(engine.arguments(args, kwargs))
        calls = [self._call(rows, [place]) for place in range(rows.count)]
        keys = engine.graphs.keys(calls)
        self._check(rows, keys[0])
        found = self._found(calls, keys)
        with batch.locked():
            starts = [
                engine.begin(session, call, one)
                for session, call, one in zip(batch.sessions, calls, found, strict=True)
            ]
            members = [
                Row(i, one.entry, start.step, one.shapes)  # masked selections of one size
                for i, (one, start) in enumerate(zip(found, starts, strict=True))
            ]
            graphs = partial(self._group, rows, found, calls, compiler)
            yield from decide(members, graphs)
            outdated = yield from answer(members, graphs)
            if outdated is None:
                result = output(members)
                for row, call, start, one in zip(members, calls, starts, found, strict=True):
                    row.step.commit(call.tensors, [], row.recorded)
                    engine.done(start, one)
                return result
        engine.outdated(found[outdated.rows[0].place].entry)
        return (yield from self.serve(batch, args, kwargs, compiler))

    def passed(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call that the model itself answers."""
        rows = batch.rows(self._engine.arguments(args, kwargs))
        for place, session in enumerate(batch.sessions):
            self._engine.passed_in(session, self._call(rows, [place]))

    def _call(self, rows: CallRows, places: Sequence[int]) -> FlatCall:
        """Return the call with these rows only."""
        return flatten_call(rows.taken(places), self._engine.graphs.timestep_argument)

    def _found(self, calls: Sequence[FlatCall], keys: Sequence[InputKey]) -> list[Found[First]]:
        """Return the graph for each row by itself. One without guards serves all of its key."""
        unguarded: dict[InputKey, Found[First]] = {}
        found = []
        for call, key in zip(calls, keys, strict=True):
            one = unguarded.get(key) or self._engine.find(call, key)
            found.append(one)
            if one.entry.captured.guards is None:
                unguarded[key] = Found(one.entry, one.shapes, None)
        return found

    def _check(self, rows: CallRows, key: Hashable) -> None:
        """Check that the model treats rows independently. `key`: of the first row's call."""
        subject = self._engine.subject
        if subject.check and rows.count > 1 and key not in self._checked:
            check_rows(subject, rows)
            if len(self._checked) >= MAX_CHECKED:
                self._checked.clear()
            self._checked.add(key)

    def _group(
        self,
        rows: CallRows,
        found: Sequence[Found[First]],
        calls: Sequence[FlatCall],
        compiler: Compiler,
        members: Sequence[Row],
        size: int,
    ) -> Group:
        """Return the graph for rows that share one by themselves, padded to `size` rows."""
        places = [row.place for row in members]
        entry, call = found[places[0]].entry, calls[places[0]]
        if size > 1:
            call = self._call(rows, [*places, *places[-1:] * (size - len(places))])
            key = RowsKey(input_key(call), entry.serial)
            entry = self._engine.find(call, key, RowsOf(entry, size)).entry
        ready = self._ready(entry, compiler)
        return Group(
            members,
            ready,
            entry.layout,
            entry.inputs(call),
            lambda step, given: execution.decided(entry, step, given, ready, compiler),
            entry.captured.around_parts,
            lambda: self._engine.graphs.stale(entry),
        )

    def _ready(self, entry: Entry, compiler: Compiler) -> Variants:
        """Return the functions that run a graph: compiled, or as it is."""
        if compiler.looks_on:
            return entry.compiled_steps
        step_compiler = self._engine.step_compiler
        if step_compiler is None:
            return entry.variants
        return step_compiler.compiled(entry.variants)
