"""Answers calls whose rows belong to different requests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dit_cache_fx.capture import FlatCall, flatten_call
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.lowering import Separate
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.drive import Compiler, Serving
from dit_cache_fx.runtime.graphs import Entry, Found, InputKey, RowsKey, RowsOf, input_key
from dit_cache_fx.runtime.row_check import check_rows, output_names
from dit_cache_fx.runtime.row_groups import Group, Row, RowGroups
from dit_cache_fx.values.pytree import unflatten
from dit_cache_fx.values.rows import CallRows

if TYPE_CHECKING:
    from dit_cache_fx.runtime.engine import Engine, First


class BatchEngine:
    """Answers each row as the engine answers it alone, as many at a time as do the same.

    A row's state is what its session holds for a call by itself: a request may leave a batch and
    join another one at any step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._checked: set[Hashable] = set()

    def forget(self) -> None:
        """Forget which calls could be split."""
        self._checked.clear()

    def serve(
        self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler
    ) -> Serving:
        """Answer a call. Nothing of it is noted when it raises."""
        engine = self._engine
        rows = batch.rows(engine.arguments(args, kwargs))
        calls = [self._call(rows, [place]) for place in range(rows.count)]
        keys = [input_key(call) for call in calls]
        self._check(rows, keys[0])
        found = self._found(calls, keys)
        with batch.locked():
            starts = [
                engine.begin(session, call, key, one)
                for session, call, key, one in zip(batch.sessions, calls, keys, found, strict=True)
            ]
            members = [
                Row(i, call, one.entry, one.shapes, start.step)
                for i, (call, one, start) in enumerate(zip(calls, found, starts, strict=True))
            ]
            groups = RowGroups(partial(self._group, rows), self._ready(compiler), compiler)
            yield from groups.decide(members)
            changed = yield from groups.answer(members, engine.graphs.stale)
            if changed is None:
                output = _output(members)
                for row, start, one in zip(members, starts, found, strict=True):
                    row.step.commit(row.call.tensors, [], row.kept)
                    engine.done(start, one)
                return output
        engine.outdated(changed)
        return (yield from self.serve(batch, args, kwargs, compiler))

    def passed(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call that the model itself answers."""
        rows = batch.rows(self._engine.arguments(args, kwargs))
        for place, session in enumerate(batch.sessions):
            self._engine.passed_in(session, self._call(rows, [place]))

    def _call(self, rows: CallRows, places: Sequence[int]) -> FlatCall:
        """The call with these rows alone."""
        return flatten_call(rows.taken(places), self._engine.graphs.timestep)

    def _found(self, calls: Sequence[FlatCall], keys: Sequence[InputKey]) -> list[Found[First]]:
        """The graph for each row by itself. Where it has no guards, it is for all of its key."""
        unguarded: dict[InputKey, Found[First]] = {}
        found = []
        for call, key in zip(calls, keys, strict=True):
            one = unguarded.get(key) or self._engine.find(call, key)
            found.append(one)
            if one.entry.captured.guards is None:
                unguarded[key] = Found(one.entry, one.shapes, None)
        return found

    def _check(self, rows: CallRows, key: Hashable) -> None:
        """See whether the model answers rows one by one. `key`: of the first row's call."""
        subject = self._engine.subject
        if subject.check and rows.count > 1 and key not in self._checked:
            check_rows(subject, rows)
            self._checked.add(key)

    def _group(self, rows: CallRows, members: Sequence[Row], size: int) -> Group:
        """The graph for rows that have the same one by themselves, padded to so many rows."""
        one = members[0]
        if size == 1:
            return Group(members, one.entry, one.call)
        places = [row.place for row in members]
        call = self._call(rows, [*places, *places[-1:] * (size - len(places))])
        key = RowsKey(input_key(call), one.entry.serial)
        found = self._engine.find(call, key, RowsOf(one.entry, size))
        return Group(members, found.entry, call)

    def _ready(self, compiler: Compiler) -> Callable[[Entry], Separate]:
        """How graphs run: compiled, or as they are."""
        separate = self._engine.step_compiler
        if compiler.looks_on:
            return lambda entry: entry.separate
        if separate is not None:
            return lambda entry: separate.compiled(entry.variants)
        return lambda entry: Separate(entry.variants, None)


def _output(members: Sequence[Row]) -> Any:
    """The call's output: that of its rows, in their order."""
    skeleton = members[0].entry.program.output
    parts = list(zip(*(row.outputs for row in members), strict=True))
    for name, rows in zip(output_names(skeleton), parts, strict=True):
        for row in rows:
            if row.shape[:1] != (1,):
                raise CaptureError(
                    f"{name} is {list(row.shape)} for one row: it has no row for each session. "
                    "Call each session by itself"
                )
    return unflatten(skeleton, [torch.cat(rows) for rows in parts])
