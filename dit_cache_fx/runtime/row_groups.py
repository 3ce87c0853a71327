"""Rows of one call that are answered together: those that compute, and those that do not."""

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
from dit_cache_fx.runtime.drive import GraphCall, Results, Serving
from dit_cache_fx.runtime.row_check import output_names
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.together import Layout, Together, sizes
from dit_cache_fx.values.pytree import unflatten


@dataclass(eq=False)
class Row:
    """The call of one row, as if it were made by itself.

    `graph`: what would answer it. `kind`: what else rows must share that are answered together.
    `carried`: what the rule's graph has computed of it; None where that is not known. `results`:
    its outputs, and what is to be held where its step computed.
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
    def kept(self) -> list[torch.Tensor]:
        return self.results[self.graph.variants.outputs :]


@dataclass(frozen=True)
class Group:
    """Rows for one graph.

    `variants`, `around`: the graph, and within what it runs. `layout`: of its rows; None for one
    row. `given`: the tensors of all rows by name. `decided`: runs the side of a step's kind with
    them and what is carried. `changed`: whether the model has changed since the graph was made.
    """

    rows: Sequence[Row]
    variants: Variants
    layout: Layout | None
    given: dict[str, torch.Tensor]
    decided: Callable[[Step | Together, dict[str, torch.Tensor]], Serving]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    changed: Callable[[], bool] = lambda: False

    @property
    def step(self) -> Step | Together:
        """Their steps as one."""
        steps = [row.step for row in self.rows]
        return steps[0] if self.layout is None else Together(steps, self.layout)

    def decide(self) -> Serving:
        """Ask the strategy's own rule, which looks at a value of the model."""
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
        """What the rule's graph has computed: of each row by then, else of all of them now."""
        known, layout = [row.carried for row in self.rows if row.carried is not None], self.layout
        if len(known) == len(self.rows) and (layout is None or layout.carried is not None):
            return known[0] if layout is None else layout.carried_together(known)
        _, *carried = yield self._prefix()
        return carried

    def _prefix(self) -> GraphCall:
        prefix = self.variants.prefix
        assert prefix is not None
        return GraphCall(prefix.run, prefix.operands(self.given), self.around)


#: the graph for rows that have the same one by themselves, for so many rows
Found = Callable[[Sequence[Row], int], Group]


def decide(rows: Sequence[Row], found: Found) -> Serving:
    """Ask the strategy's own rule for each row."""
    looking = [row for row in rows if row.graph.variants.prefix is not None]
    for row in rows:
        if row.graph.variants.prefix is None:
            row.step.decide(None)
    for group in _groups(looking, found, lambda _: None):
        yield from group.decide()


def answer(rows: Sequence[Row], found: Found) -> Serving:
    """Run the rows. Returns the group whose graph is out of date, where there is one."""
    groups = list(_groups(rows, found, lambda row: row.step.computes))
    for group in groups:
        if group.step.computes and group.changed():
            return group
    for group in groups:
        yield from group.answer()
    return None


def output(rows: Sequence[Row]) -> Any:
    """The call's output: that of its rows, in their order."""
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


def _groups(rows: Sequence[Row], found: Found, kind: Callable[[Row], Hashable]) -> Iterator[Group]:
    """Rows of one kind whose graph by themselves is the same, in sizes for which there is one."""
    alike: dict[Hashable, list[Row]] = {}
    for row in rows:
        alike.setdefault((row.graph, row.kind, kind(row)), []).append(row)
    for members in alike.values():
        rest = iter(members)
        for size in sizes(len(members)):
            yield found(list(islice(rest, size)), size)
