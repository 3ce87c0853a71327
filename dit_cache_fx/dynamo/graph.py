"""One graph of Dynamo, cached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from dit_cache_fx._torch import Piece
from dit_cache_fx.dynamo.capture import Input, Outlined
from dit_cache_fx.dynamo.inner import Compile
from dit_cache_fx.dynamo.lower import DynamoEntry, lower
from dit_cache_fx.dynamo.parts import flat
from dit_cache_fx.dynamo.reads import as_number
from dit_cache_fx.dynamo.rows import RowAnswers
from dit_cache_fx.dynamo.run_step import run_step
from dit_cache_fx.dynamo.shared import Compiled, Shared, step_value
from dit_cache_fx.errors import CaptureError, DiscoveryError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.drive import lasting
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue
from dit_cache_fx.values.identity import storage_key
from dit_cache_fx.values.pytree import unflatten

#: the largest number of shapes with variants, for one graph with dynamic shapes
MAX_SHAPES = 32
#: the largest number of read values with graphs, for each of these shapes
MAX_VALUES = 8

_NO_TIMESTEP = (
    "the timestep is no tensor input of the compiled graph. Pass it as a tensor (a number "
    "becomes a constant there), name it (timestep='...'), or set cur_timestep"
)
_SPLIT_BATCH = (
    "Dynamo splits the model (TORCH_LOGS=graph_breaks shows where), and a batch of sessions "
    "needs it in one graph: dit_cache_fx.apply(model, ...) can capture it, or call each session "
    "by itself"
)
_READ_BATCH = (
    "the model reads a value from its tensors (.item()) or changes one in place, for all rows of "
    "a batch of sessions together: call each session by itself"
)
_SHARED = "the model changes a tensor in place that shares memory with another argument"
_TOO_MANY_VALUES = (
    f"the model's own code (outside its blocks) reads more than {MAX_VALUES} values from tensors "
    "(.item()), and each would need a graph of its own"
)


class CachedGraph:
    """Answers the calls of one of Dynamo's graphs: a model, or a piece of one."""

    def __init__(
        self,
        shared: Shared,
        compile_graph: Compile,
        outlined: Outlined,
        piece: Piece,
        plain: Compiled | None = None,
    ) -> None:
        self._shared = shared
        self._compile = compile_graph
        self._outlined = outlined
        self._piece = piece
        self._entries: OrderedDict[Hashable, DynamoEntry | None] = OrderedDict()
        self._dynamos = plain  # the original graph, if it is compiled already
        self._plain: OrderedDict[Hashable, Compiled] = OrderedDict()
        self._making = threading.RLock()  # entries and plain graphs are made once
        self._rows = RowAnswers(shared.call_log, outlined, self._lower_rows)
        self._reason = ""  # why it is not cached
        self._called = False

    def __call__(self, *given: Input) -> Sequence[Any]:
        inputs = self._inputs(given)
        batch = self._shared.call_log.tracker.batch
        if batch is not None and self._shared.enabled:
            return self._serve_rows(batch, inputs)
        key = self._key(inputs)
        value = self._value(inputs) if self._shared.enabled else None
        entry = None if value is None else self._entry(key, inputs)
        tensors: Any = [inputs[i] for i in self._outlined.tensors]
        if entry is not None and _shares_changed(entry, tensors):
            self._missed(_SHARED)
            entry = None
        if value is None or entry is None:
            return self._uncached(inputs) if self._dynamos is None else self._dynamos(*given)
        return self._serve(entry, value, tensors)

    def lowered(self) -> list[Lowered]:
        """Return the graphs."""
        found = [entry for entry in [*self._entries.values()] if entry is not None]
        return found + self._rows.lowered()

    def forget(self) -> None:
        """Forget the graphs."""
        self._entries.clear()
        self._rows.forget()

    # --- a call ------------------------------------------------------------------------------

    def _inputs(self, given: Sequence[Input]) -> list[Input]:
        """Return a call's inputs with plain numbers, then the values read from its tensors."""
        outlined, inputs = self._outlined, [*given]
        for i in outlined.numbers:
            inputs[i] = _number(inputs[i])
        step = outlined.number_step
        if step is not None:
            inputs[step] = as_number(torch.as_tensor(inputs[step]))
        return inputs if outlined.reads is None else [*inputs, *outlined.reads(given)]

    def _key(self, inputs: Sequence[Input]) -> Hashable:
        """Return the key of the graphs: constant without dynamic shapes, by Dynamo's guards."""
        if not self._outlined.dynamic:
            return ()
        given = [inputs[i] for i in self._outlined.given if i < len(inputs)]
        return tuple(
            (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else v
            for v in given
        )

    def _value(
        self, inputs: Sequence[Input], session: Session | None = None
    ) -> TimestepValue | None:
        value = step_value(self._shared, self._outlined, self._piece, inputs, session)
        if value is None:
            self._missed(_NO_TIMESTEP)
        return value

    def _serve(
        self, lowered: DynamoEntry, value: TimestepValue, tensors: Sequence[torch.Tensor]
    ) -> Sequence[Any]:
        call_log, variants = self._shared.call_log, lowered.variants
        session = call_log.tracker.session
        given = [tensors[i] for i in lowered.given]
        with session.lock, torch.no_grad():
            derived = not self._piece.first
            evidence = call_log.evidence(
                session, lowered, lowered.signature, value, tensors, derived
            )
            start = call_log.begin(session, evidence, lowered)
            results = run_step(lowered, start.step, tensors)
            outputs = lasting(results[: variants.outputs])
            recorded = lasting([t.contiguous() for t in results[variants.outputs :]])
            owned = start.step.commit(given, outputs, recorded)
            arguments = lowered.program.arguments
            call_log.done(start, lambda: [arguments[i] for i in lowered.conditioning])
            output: Any = unflatten(lowered.program.output, owned)
            if lowered.changed:
                output, changed = output
                for place, tensor in zip(lowered.changed, changed, strict=True):
                    tensors[place].copy_(tensor)
        return output  # type: ignore[no-any-return]

    def _serve_rows(self, batch: Batch, inputs: Sequence[Input]) -> Sequence[Any]:
        """Answer a call whose rows belong to different sessions."""
        if not self._piece.whole:
            raise CaptureError(_SPLIT_BATCH)
        if self._outlined.asks:
            raise CaptureError(_READ_BATCH)

        def value(session: Session, given: Sequence[Input]) -> TimestepValue:
            found = self._value(given, session)
            if found is None:
                raise CaptureError(_NO_TIMESTEP)
            return found

        return self._rows(batch, inputs, self._key, value)

    def _uncached(self, inputs: list[Input]) -> Sequence[Any]:
        key, step = self._key(inputs), self._outlined.number_step
        if step is not None:
            inputs[step] = _number(inputs[step])
            key = key, inputs[step]
        compiled = self._plain.get(key)
        if compiled is None:
            compiled = self._compiled_plain(key, inputs)
        return compiled(*inputs)

    def _compiled_plain(self, key: Hashable, inputs: Sequence[Input]) -> Compiled:
        with self._making:
            if key not in self._plain:
                outlined = self._outlined
                numbers = outlined.numbers or outlined.number_step is not None
                gm = flat(outlined.gm) if numbers else outlined.dynamos
                self._plain[key] = self._compile(gm, inputs)
                _drop_oldest(self._plain)
            return self._plain[key]

    # --- a capture ---------------------------------------------------------------------------

    def _entry(self, key: Hashable, inputs: Sequence[Input]) -> DynamoEntry | None:
        """Return the graphs for inputs like these; None if there can be none."""
        entry = self._entries.get(key) or self._made(key, inputs)
        if entry is None:
            self._missed(self._reason)
        return entry

    def _made(self, key: Hashable, inputs: Sequence[Input]) -> DynamoEntry | None:
        with self._making:
            if self._values(inputs) >= MAX_VALUES:
                self._reason = _TOO_MANY_VALUES
                return self._entries.get(key)
            if key not in self._entries:
                try:
                    self._entries[key] = lower(
                        self._outlined, inputs, self._shared, self._compile, self._piece.whole
                    )
                    self._shared.caches = True
                except (CaptureError, DiscoveryError) as error:
                    self._entries[key] = None
                    self._reason = str(error)
                _drop_oldest(self._entries)
            return self._entries[key]

    def _values(self, inputs: Sequence[Input]) -> int:
        """Return the number of read values with graphs, for shapes like these."""
        if self._outlined.reads is None:
            return 0
        like = self._key(inputs[: len(inputs) - self._outlined.read])
        return sum(key[: len(like)] == like for key in self._entries)  # type: ignore

    def _lower_rows(self, inputs: Sequence[Input], alone: Alone | None = None) -> DynamoEntry:
        entry = lower(self._outlined, inputs, self._shared, self._compile, self._piece.whole, alone)
        if entry.changed:
            raise CaptureError(_READ_BATCH)
        return entry

    def _missed(self, reason: str) -> None:
        self._shared.uncached(reason, self._called)
        self._called = True


def _shares_changed(entry: DynamoEntry, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a tensor that the graph changes in place shares memory with another one."""
    if not entry.changed:
        return False
    keys = [storage_key(t) for t in tensors]
    return any(keys.count(keys[place]) > 1 for place in entry.changed)


def _number(value: Input) -> int | float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _drop_oldest(kept: OrderedDict[Hashable, Any]) -> None:
    while len(kept) > MAX_SHAPES:
        kept.popitem(last=False)
