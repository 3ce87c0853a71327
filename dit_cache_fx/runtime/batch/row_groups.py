"""Group the rows of a call: those that compute, and those that reuse."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.lowering import Variants
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.batch.row_check import output_names
from dit_cache_fx.runtime.batch.row_steps import RowLayout, RowSteps, sizes
from dit_cache_fx.runtime.drive import GraphCall, Results, Serving
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.values.pytree import unflatten


@dataclass(eq=False)
class Row:
    """The call of one row, as if it were made by itself.

    `graph`: the graph that would answer it. `kind`: the rest of the group's key. `carried`: the
    results of the rule's graph for it; None if unknown. `results`: its outputs, and the tensors
    that its step recorded if it computed.
    """

    place: int
    graph: Lowered
    step: Step
    kind: Hashable = None
    carried: Results | None = None
    results: list[torch.Tensor] = field(default_factory=list)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return self.results[: self.graph.variants.outputs]

    @property
    def recorded(self) -> list[torch.Tensor]:
        return self.results[self.graph.variants.outputs :]


@dataclass(frozen=True)
class Group:
    """Rows for one graph.

    `variants`: the graph. `around_parts`: the context to run the rule's graph in, which may hold
    parts of blocks. `layout`: of its rows; None for one row. `given`: the tensors of all rows by
    name. `decided`: runs the side of a step's kind with them and the carried tensors. `changed`:
    whether the model has changed since the capture.
    """

    rows: Sequence[Row]
    variants: Variants
    layout: RowLayout | None
    given: dict[str, torch.Tensor]
    decided: Callable[[Step | RowSteps, dict[str, torch.Tensor]], Serving]
    around_parts: Callable[[], AbstractContextManager[Any]] = nullcontext
    changed: Callable[[], bool] = lambda: False

    @property
    def step(self) -> Step | RowSteps:
        """Return their steps as one."""
        steps = [row.step for row in self.rows]
        return steps[0] if self.layout is None else RowSteps(steps, self.layout)

    def decide(self) -> Serving:
        """Run the strategy's rule, which reads a value of the model."""
        value, *carried = yield self._prefix()
        self.step.decide(value)
        by_row = [carried] if self.layout is None else self.layout.carried_rows(carried)
        for row, own in zip(self.rows, by_row, strict=False):
            row.carried = own

    def answer(self) -> Serving:
        """Run the side of their steps' kind."""
        carried = [] if self.variants.prefix is None else (yield from self._carried())
        more = dict(zip(self.variants.carried, carried, strict=True))
        results = yield from self.decided(self.step, self.given | more)
        by_row = [list(results)] if self.layout is None else self.layout.rows(results)
        for row, own in zip(self.rows, by_row, strict=False):
            row.results = own

    def _carried(self) -> Serving:
        """Return the results of the rule's graph: of each row by then, or of all of them now."""
        known, layout = [row.carried for row in self.rows if row.carried is not None], self.layout
        if len(known) == len(self.rows) and (layout is None or layout.carried is not None):
            return known[0] if layout is None else layout.carried_together(known)
        _, *carried = yield self._prefix()
        return carried

    def _prefix(self) -> GraphCall:
        prefix = self.variants.prefix
        assert prefix is not None
        return GraphCall(prefix.run, prefix.operands(self.given), self.around_parts)


#: (rows with the same graph by themselves, number of rows) -> the graph for so many
FindGroup = Callable[[Sequence[Row], int], Group]


def decide(rows: Sequence[Row], find: FindGroup) -> Serving:
    """Run the strategy's rule for each row."""
    looking = [row for row in rows if row.graph.variants.prefix is not None]
    for row in rows:
        if row.graph.variants.prefix is None:
            row.step.decide(None)
    for group in _groups(looking, find, lambda _: None):
        yield from group.decide()


def answer(rows: Sequence[Row], find: FindGroup) -> Serving:
    """Run the rows. Returns a group whose graph is out of date, if there is one."""
    groups = list(_groups(rows, find, lambda row: row.step.computes))
    for group in groups:
        if group.step.computes and group.changed():
            return group
    for group in groups:
        yield from group.answer()
    return None


def output(rows: Sequence[Row]) -> Any:
    """Return the call's output: that of its rows, in their order."""
    skeleton = rows[0].graph.program.output
    parts = list(zip(*(row.outputs for row in rows), strict=True))
    for name, part in zip(output_names(skeleton), parts, strict=True):
        for tensor in part:
            if tensor.shape[:1] != (1,):
                raise CaptureError(
                    f"{name} is {list(tensor.shape)} for one row: it has no row for each session. "
                    "Call each session by itself"
                )
    return unflatten(skeleton, [torch.cat(part) for part in parts])


def _groups(
    rows: Sequence[Row], find: FindGroup, kind: Callable[[Row], Hashable]
) -> Iterator[Group]:
    """Group rows of one kind with the same graph, in sizes that have a graph."""
    alike: dict[Hashable, list[Row]] = {}
    for row in rows:
        alike.setdefault((row.graph, row.kind, kind(row)), []).append(row)
    for members in alike.values():
        rest = iter(members)
        for size in sizes(len(members)):
            yield find(list(islice(rest, size)), size)
