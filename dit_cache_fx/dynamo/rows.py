"""A call of Dynamo's graph whose rows belong to different sessions.

If Dynamo has made the number of rows dynamic, the graph accepts any number of them: then it is
called with some of them. Each number is checked once for equal results.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from dit_cache_fx.dynamo.capture import Input, Outlined
from dit_cache_fx.dynamo.parts import flat
from dit_cache_fx.errors import OptionError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.ranks import together
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.batch.row_check import SPLIT, compare_rows, tolerance
from dit_cache_fx.runtime.batch.row_groups import Group, Row, answer, decide, output
from dit_cache_fx.runtime.batch.row_steps import RowLayout, RowSteps
from dit_cache_fx.runtime.call_log import CallLog, CallStart
from dit_cache_fx.runtime.drive import GraphCall, Serving, lasting
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue
from dit_cache_fx.values.rows import CallRows

#: the largest number of graphs of rows, for one of Dynamo's graphs
MAX_GRAPHS = 128
#: makes the graphs for inputs like these, with a clock for each row
Lower = Callable[[Sequence[Input], Alone | None], Lowered]


class RowGraphs:
    """The graphs of one of Dynamo's graphs for some of the rows of a call, by their shapes."""

    def __init__(self, lower: Lower) -> None:
        self._lower = lower
        self._made: OrderedDict[Hashable, tuple[Lowered, RowLayout | None]] = OrderedDict()
        self._making = threading.RLock()

    def forget(self) -> None:
        """Forget the graphs."""
        self._made.clear()

    def all(self) -> list[Lowered]:
        """Return every graph."""
        return [lowered for lowered, _ in [*self._made.values()]]

    def of(self, key: Hashable, inputs: Sequence[Input]) -> Lowered:
        """Return the graph for one row by itself."""
        return self._found(key, lambda: (self._lower(inputs, None), None))[0]

    def of_many(
        self, key: Hashable, inputs: Sequence[Input], one: Lowered, count: int
    ) -> tuple[Lowered, RowLayout | None]:
        """Return the graph for several rows, and their layout."""

        def make() -> tuple[Lowered, RowLayout | None]:
            many = self._lower(inputs, Alone(count, one.program.values()))
            return many, RowLayout.of(one, many, count)

        return self._found(key, make)

    def _found(
        self, key: Hashable, make: Callable[[], tuple[Lowered, RowLayout | None]]
    ) -> tuple[Lowered, RowLayout | None]:
        found = self._made.get(key)
        if found is None:
            with self._making:
                found = self._made.get(key) or make()
                self._made[key] = found
                while len(self._made) > MAX_GRAPHS:
                    self._made.popitem(last=False)
        return found


class RowCall:
    """One call, by rows."""

    def __init__(self, outlined: Outlined, batch: Batch, inputs: Sequence[Input]) -> None:
        self.outlined, self.inputs = outlined, inputs
        named = {n: inputs[i] for n, i in zip(outlined.names, outlined.tensors, strict=True)}
        self.rows: CallRows = batch.rows(named, own=outlined.owned)
        self._sizes = self._dynamic_sizes() if self.rows.count > 1 else set[int]()

    def taken(self, places: Sequence[int]) -> list[Input]:
        """Return the inputs for these rows."""
        inputs = list(self.inputs)
        values = self.rows.taken(places).values()
        for i, value in zip(self.outlined.tensors, values, strict=True):
            inputs[i] = value
        for i in self._sizes:
            inputs[i] = len(places)
        return inputs

    def _dynamic_sizes(self) -> set[int]:
        """Return the indexes of the inputs that are the number of rows; there may be none."""
        nodes = self.outlined.dynamos.graph.find_nodes(op="placeholder")
        values = [node.meta.get("example_value", node.meta.get("val")) for node in nodes]
        places = dict(zip(self.outlined.names, self.outlined.tensors, strict=True))
        sizes = {str(values[places[name]].shape[0]) for name in self.rows.names}
        if any(size.isdecimal() for size in sizes):
            raise OptionError(
                "sessions",
                f"{self.rows.count} of them",
                "rows of a graph for any number of them, but Dynamo has made one for "
                f"{self.rows.count} only: use torch.compile(model, backend=..., dynamic=True)",
            )
        return {i for i, v in enumerate(values) if isinstance(v, torch.SymInt) and str(v) in sizes}


class RowAnswers:
    """Answers calls of one of Dynamo's graphs by rows."""

    def __init__(self, call_log: CallLog, outlined: Outlined, lower: Lower) -> None:
        self._call_log = call_log
        self._outlined = outlined
        self._graphs = RowGraphs(lower)
        self._checked: set[Hashable] = set()

    def forget(self) -> None:
        """Forget the graphs."""
        self._graphs.forget()
        self._checked.clear()

    def lowered(self) -> list[Lowered]:
        """Return the graphs."""
        return self._graphs.all()

    def __call__(
        self,
        batch: Batch,
        inputs: Sequence[Input],
        key: Callable[[Sequence[Input]], Hashable],
        value: Callable[[Session, Sequence[Input]], TimestepValue],
    ) -> Sequence[Any]:
        """Answer a call. Records nothing if it raises.

        `key`: of the graphs. `value`: the timestep in a row's inputs.
        """
        call = RowCall(self._outlined, batch, inputs)
        alone = [call.taken([place]) for place in range(call.rows.count)]
        one = self._graphs.of(key(alone[0]), alone[0])
        places = self._outlined.tensors
        tensors: list[list[Any]] = [[given[i] for i in places] for given in alone]
        with batch.locked(), torch.no_grad():
            starts = [
                self._begin(session, one, value(session, given), own)
                for session, given, own in zip(batch.sessions, alone, tensors, strict=True)
            ]
            rows = [Row(i, one, start.step) for i, start in enumerate(starts)]

            def found(members: Sequence[Row], size: int) -> Group:
                places = [row.place for row in members]
                given = call.taken([*places, *places[-1:] * (size - len(places))])
                return self._group(call, members, size, given, key(given))

            _run(decide(rows, found))
            _run(answer(rows, found))
            result: Sequence[Any] = output(rows)
            for row, start, own in zip(rows, starts, tensors, strict=True):
                start.step.commit(own, [], row.recorded)
                self._call_log.done(
                    start, lambda: [one.program.arguments[i] for i in one.conditioning]
                )
        return result

    def _begin(
        self, session: Session, one: Lowered, value: TimestepValue, tensors: Sequence[Any]
    ) -> CallStart:
        evidence = self._call_log.evidence(session, one, one.signature, value, tensors)
        return self._call_log.begin(session, evidence, one)

    def _group(
        self, call: RowCall, members: Sequence[Row], size: int, given: list[Input], key: Hashable
    ) -> Group:
        one = members[0].graph
        lowered, layout = (one, None) if size == 1 else self._graphs.of_many(key, given, one, size)
        if key not in self._checked and call.rows.count > 1:
            self._check(call, members, given)
            self._checked.add(key)
        tensors: Any = [given[i] for i in call.outlined.tensors]
        named = dict(zip(lowered.program.inputs, tensors, strict=True))
        variants = lowered.variants

        def decided(step: Step | RowSteps, given: dict[str, torch.Tensor]) -> Serving:
            part = variants.compute if step.computes else variants.reuse
            given.update(step.compiled_given(part.names))
            return (yield GraphCall(part.run, part.operands(given)))

        return Group(members, variants, layout, named, decided)

    def _check(self, call: RowCall, members: Sequence[Row], given: list[Input]) -> None:
        """Raise if Dynamo's graph gives other results for these rows than for all."""
        whole, some = (_answer(call.outlined, inputs) for inputs in (call.inputs, given))
        parameters = [t for t in call.inputs if isinstance(t, torch.Tensor)]
        near = tolerance([*whole, *parameters])
        names = [f"output {i}" for i in range(len(whole))]
        with together(members[0].graph.strategy.ranks, SPLIT):
            for place, row in enumerate(members):
                compare_rows(call.rows, names, (whole, row.place), (some, place), near)


def _answer(outlined: Outlined, inputs: Sequence[Input]) -> list[torch.Tensor]:
    """Run Dynamo's graph on copies of its inputs, which it may change."""
    own = {i for i, n in zip(outlined.tensors, outlined.names, strict=True) if n in outlined.owned}
    copies = [
        v.clone() if isinstance(v, torch.Tensor) and i not in own else v
        for i, v in enumerate(inputs)
    ]
    if outlined.number_step is not None:
        copies[outlined.number_step] = torch.as_tensor(copies[outlined.number_step]).item()
    numbers = outlined.numbers or outlined.number_step is not None
    results = (flat(outlined.gm) if numbers else outlined.dynamos)(*copies)
    return [result for result in results if isinstance(result, torch.Tensor)]


def _run(serving: Serving) -> None:
    """Run the graphs of a call without a compiler."""
    call = next(serving, None)
    while call is not None:
        results = lasting(call.graph(*call.operands))
        try:
            call = serving.send(results)
        except StopIteration:
            return
