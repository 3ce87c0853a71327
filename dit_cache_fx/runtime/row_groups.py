"""Rows of one call that are answered together: those that compute, and those that do not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dit_cache_fx.capture import FlatCall, Shapes
from dit_cache_fx.lowering import Separate
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.drive import Compiler, Serving, Stage
from dit_cache_fx.runtime.graphs import Entry
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.together import Together, sizes


@dataclass(eq=False)
class Row:
    """The call of one row, as if it were made by itself.

    `entry`: the graph that would answer it. `carried`: what the rule's graph has computed of it.
    `results`: its outputs, and what is to be held where its step computed.
    """

    place: int
    call: FlatCall
    entry: Entry
    shapes: Shapes
    step: Step
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    results: list[torch.Tensor] = field(default_factory=list)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return self.results[: self.entry.variants.outputs]

    @property
    def kept(self) -> list[torch.Tensor]:
        return self.results[self.entry.variants.outputs :]


class Group(NamedTuple):
    """Rows for one graph. `call`: of all of them, and of some more where that is padded."""

    rows: Sequence[Row]
    entry: Entry
    call: FlatCall

    @property
    def step(self) -> Step | Together:
        """Their steps as one."""
        steps, layout = [row.step for row in self.rows], self.entry.layout
        return steps[0] if layout is None else Together(steps, layout)


class RowGroups:
    """Runs graphs for groups of rows.

    `found`: the graph for rows that have the same one by themselves, and their call, for a graph of
    so many rows. `ready`: the graphs of each kind of step, as they run.
    """

    def __init__(
        self,
        found: Callable[[Sequence[Row], int], Group],
        ready: Callable[[Entry], Separate],
        compiler: Compiler,
    ) -> None:
        self._found = found
        self._ready = ready
        self._compiler = compiler

    def decide(self, rows: Sequence[Row]) -> Serving:
        """Ask the strategy's own rule for each row."""
        for row in rows:
            if row.entry.variants.prefix is None:
                row.step.decide(None)
        looking = [row for row in rows if row.entry.variants.prefix is not None]
        for group in self._groups(looking, lambda _: None):
            yield from self._decide(group)

    def answer(self, rows: Sequence[Row], changed: Callable[[Entry], bool]) -> Serving:
        """Run the rows, and give whether that was for nothing.

        `changed`: whether a graph is of a model that has changed since; only what computes asks.
        """
        groups = list(self._groups(rows, lambda row: row.step.computes))
        for group in groups:
            if group.step.computes and changed(group.entry):
                return group.entry
        for group in groups:
            yield from self._answer(group)
        return None

    def _decide(self, group: Group) -> Serving:
        entry, call = group.entry, group.call
        variants = self._ready(entry).variants
        assert variants.prefix is not None
        given = variants.prefix.operands(entry.inputs(call))
        value, *carried = yield Stage(variants.prefix.run, given, entry.captured.around)
        group.step.decide(value)
        layout = entry.layout
        by_row = [dict(zip(variants.carried, carried, strict=True))]
        by_row = by_row if layout is None else layout.carried_rows(carried)
        for row, own in zip(group.rows, by_row, strict=False):
            row.carried = own

    def _answer(self, group: Group) -> Serving:
        entry, layout = group.entry, group.entry.layout
        carried = [row.carried for row in group.rows]
        given = entry.inputs(group.call)
        given.update(carried[0] if layout is None else layout.carried_together(carried))
        ready = self._ready(entry)
        results = yield from execution.decided(entry, group.step, given, ready, self._compiler)
        by_row = [list(results)] if layout is None else layout.rows(results)
        for row, own in zip(group.rows, by_row, strict=False):
            row.results = own

    def _groups(self, rows: Sequence[Row], kind: Callable[[Row], Hashable]) -> Iterator[Group]:
        """Rows of one kind whose graph by themselves is the same, in sizes for which there is one.

        Masked selections of one size go together: others would be no rows of one tensor.
        """
        alike: dict[Hashable, list[Row]] = {}
        for row in rows:
            alike.setdefault((row.entry, row.shapes, kind(row)), []).append(row)
        for members in alike.values():
            rest = iter(members)
            for size in sizes(len(members)):
                yield self._found(list(_first(rest, size)), size)


def _first(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """At most so many of the rows that are left."""
    for _, row in zip(range(count), rows, strict=False):
        yield row
