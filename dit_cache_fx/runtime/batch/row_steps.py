"""Join the steps of several rows, for a graph of as many rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.alone import place_of
from dit_cache_fx.ir.nodes import tensor_spec
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.drive import Results
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec

_T = TypeVar("_T")

#: the largest share of rows that padding adds to a group
PADDING = 0.25


def sizes(rows: int) -> list[int]:
    """Return the sizes of the graphs for so many rows: powers of two.

    They are as few as possible with at most a quarter of padding: 3 rows are 2 and 1, 7 rows are 8,
    11 rows are 8, 2 and 1.
    """
    if rows == 0:
        return []
    size = 1 << (rows - 1).bit_length()
    if size - rows <= PADDING * rows:
        return [size]
    return [size // 2, *sizes(rows - size // 2)]


@dataclass(frozen=True)
class RowLayout:
    """The dimension of the rows in each operand and result of a graph; 0 in outputs.

    `alone`: the cached tensors of a single row. `signal`: in the rule's operand; `carried`: in the
    other results of the rule's graph. None: independent of rows. `carried` is missing if it cannot
    be determined (rows and tokens in one dimension). `alone` and `cached` have the same order, but
    their names may differ.
    """

    count: int
    outputs: int
    alone: Mapping[str, TensorSpec]
    cached: Mapping[str, RowPlace]
    carried: Sequence[RowPlace | None] | None
    signal: RowPlace | None

    @staticmethod
    def of(one: Lowered, many: Lowered, count: int) -> RowLayout:
        """Find the layout. Raises `CaptureError` if the rows cannot be determined."""
        alone, cached = one.variants.cached, many.variants.cached
        if one.program.output != many.program.output or len(alone) != len(cached):
            raise CaptureError(
                f"the model behaves differently with {count} rows than with one: sessions cannot "
                "run as one batch. Call each session by itself"
            )
        pairs = zip(cached.items(), alone.values(), strict=True)
        signal, signals = one.program.signal, many.program.signal
        return RowLayout(
            count,
            many.variants.outputs,
            alone,
            {name: place_of(name, own, spec, count) for (name, spec), own in pairs},
            _carried(one, many, count),
            None if signal is None or signals is None else _place(signal, signals, count),
        )

    def rows(self, results: Results) -> list[list[torch.Tensor]]:
        """Return the outputs of each row, and the tensors to hold if the step computed."""
        places = [*[RowPlace(0)] * self.outputs, *self.cached.values()]
        split = [p.split(t) for p, t in zip(places, results, strict=False)]
        return [[rows[i] for rows in split] for i in range(self.count)]

    def own(self, names: Collection[str]) -> dict[str, str]:
        """Return, by its name in the graph, the name that each cached tensor has for one row."""
        pairs = zip(self.cached, self.alone, strict=True)
        return {name: own for name, own in pairs if name in names}

    def carried_rows(self, carried: Results) -> list[Results | None]:
        """Return the results of the rule's graph for each row."""
        if self.carried is None:
            return [None] * self.count
        split = [
            [tensor] * self.count if place is None else place.split(tensor)
            for place, tensor in zip(self.carried, carried, strict=True)
        ]
        return [[rows[i] for rows in split] for i in range(self.count)]

    def carried_together(self, rows: Sequence[Results]) -> Results:
        """Join those results of all rows."""
        assert self.carried is not None
        by_tensor = zip(self.carried, zip(*self.filled(rows), strict=True), strict=True)
        return [own[0] if place is None else place.joined(own) for place, own in by_tensor]

    def filled(self, rows: Sequence[_T]) -> list[_T]:
        """Repeat the last row until there are as many as the graph has."""
        return [*rows, *[rows[-1]] * (self.count - len(rows))]


def _carried(one: Lowered, many: Lowered, count: int) -> list[RowPlace | None] | None:
    first, second = ([of.program.node(n) for n in of.variants.carried] for of in (one, many))
    if [node.target for node in first] != [node.target for node in second]:
        return None
    try:
        return [_place(*nodes, count) for nodes in zip(first, second, strict=True)]
    except CaptureError:
        return None


def _place(one: fx.Node, many: fx.Node, count: int) -> RowPlace | None:
    alone, together = tensor_spec(one), tensor_spec(many)
    return None if alone == together else place_of(many.name, alone, together, count)


class RowSteps:
    """Steps of several branches that all compute, all reuse, or have not decided yet.

    There may be fewer than the graph has rows: the last one fills the rest.
    """

    def __init__(self, steps: Sequence[Step], layout: RowLayout) -> None:
        self._steps = steps
        self._layout = layout

    @property
    def computes(self) -> bool:
        return self._steps[0].computes

    def decide(self, value: torch.Tensor | None) -> None:
        """Run the strategy's rule for each. `value`: of the model, if the rule reads one."""
        place = self._layout.signal
        rows = None if value is None or place is None else place.split(value)
        for i, step in enumerate(self._steps):
            step.decide(value if rows is None else rows[i])

    def given(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the operands `names` of the graph: cached tensors, and the clocks side by side."""
        own, places = self._layout.own(names), self._layout.cached
        cached = self._layout.filled([step.cached(own.values()) for step in self._steps])
        clock = self._layout.filled([step.clock(names) for step in self._steps])
        device = next((spec.device for spec in self._layout.alone.values()), None)
        joined = {name: places[name].joined([c[one] for c in cached]) for name, one in own.items()}
        stacked = {name: torch.stack([c[name] for c in clock]) for name in clock[0]}
        return joined | {
            name: tensor.to(device or tensor.device, non_blocking=True)  # without a wait
            for name, tensor in stacked.items()
        }

    compiled_given = given
