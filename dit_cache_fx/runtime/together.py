"""Steps of several rows as one step, for a graph of as many rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.alone import place_of
from dit_cache_fx.ir.program import tensor_spec
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.drive import Results
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec

_T = TypeVar("_T")

#: a group is made larger by at most this share of it, with rows that nobody reads
PADDING = 0.25


def sizes(rows: int) -> list[int]:
    """How many rows each graph takes, for so many rows: powers of two.

    They are as few as they can be where no more than a quarter is added to any number of rows: 3
    rows are 2 and 1, 7 rows are 8, 11 rows are 8, 2 and 1.
    """
    if rows == 0:
        return []
    size = 1 << (rows - 1).bit_length()
    if size - rows <= PADDING * rows:
        return [size]
    return [size // 2, *sizes(rows - size // 2)]


@dataclass(frozen=True)
class Layout:
    """Where the rows are in what a graph of `count` rows takes and gives; in outputs: in front.

    `alone`: what one row by itself holds. `signal`: in what a rule looks at; `carried`: in what
    the rule's graph has computed for the others. None: nothing there depends on rows. There is no
    `carried` where it cannot be told (rows and tokens in one dimension). `alone` and `held` are in
    the same order; their names may differ.
    """

    count: int
    outputs: int
    alone: Mapping[str, TensorSpec]
    held: Mapping[str, RowPlace]
    carried: Sequence[RowPlace | None] | None
    signal: RowPlace | None

    @staticmethod
    def of(one: Lowered, many: Lowered, count: int) -> Layout:
        """Raises `CaptureError` where there is no telling the rows."""
        alone, held = one.variants.held, many.variants.held
        if one.program.output != many.program.output or len(alone) != len(held):
            raise CaptureError(
                f"the model does something else with {count} rows than with one: sessions cannot "
                "be answered together. Call each session by itself"
            )
        pairs = zip(held.items(), alone.values(), strict=True)
        signal, signals = one.program.signal, many.program.signal
        return Layout(
            count,
            many.variants.outputs,
            alone,
            {name: place_of(name, own, spec, count) for (name, spec), own in pairs},
            _carried(one, many, count),
            None if signal is None or signals is None else _place(signal, signals, count),
        )

    def rows(self, results: Results) -> list[list[torch.Tensor]]:
        """The outputs, and what is to be held where the step computed, of each row."""
        places = [*[RowPlace(0)] * self.outputs, *self.held.values()]
        split = [p.split(t) for p, t in zip(places, results, strict=False)]
        return [[rows[i] for rows in split] for i in range(self.count)]

    def own(self, names: Collection[str]) -> dict[str, str]:
        """By its name in the graph, the name under which one row by itself holds it."""
        pairs = zip(self.held, self.alone, strict=True)
        return {name: own for name, own in pairs if name in names}

    def carried_rows(self, carried: Results) -> list[Results | None]:
        """What the rule's graph has computed, of each row."""
        if self.carried is None:
            return [None] * self.count
        split = [
            [tensor] * self.count if place is None else place.split(tensor)
            for place, tensor in zip(self.carried, carried, strict=True)
        ]
        return [[rows[i] for rows in split] for i in range(self.count)]

    def carried_together(self, rows: Sequence[Results]) -> Results:
        """The same for all rows."""
        assert self.carried is not None
        by_tensor = zip(self.carried, zip(*self.filled(rows), strict=True), strict=True)
        return [own[0] if place is None else place.joined(own) for place, own in by_tensor]

    def filled(self, rows: Sequence[_T]) -> list[_T]:
        """As many as the graph has rows: the last one stands for the rest."""
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


class Together:
    """Steps of several branches that all compute, or all do not, or have not decided yet.

    There may be fewer than the graph has rows: the last one stands for the rest.
    """

    def __init__(self, steps: Sequence[Step], layout: Layout) -> None:
        self._steps = steps
        self._layout = layout

    @property
    def computes(self) -> bool:
        return self._steps[0].computes

    def decide(self, value: torch.Tensor | None) -> None:
        """Ask the strategy's own rule for each. `value`: of the model, if it looks at one."""
        place = self._layout.signal
        rows = None if value is None or place is None else place.split(value)
        for i, step in enumerate(self._steps):
            step.decide(value if rows is None else rows[i])

    def given(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """What the graph reads of `names`: what is held, and the clocks, which are beside it."""
        own, places = self._layout.own(names), self._layout.held
        held = self._layout.filled([step.held(own.values()) for step in self._steps])
        clock = self._layout.filled([step.clock(names) for step in self._steps])
        device = next((spec.device for spec in self._layout.alone.values()), None)
        joined = {name: places[name].joined([h[one] for h in held]) for name, one in own.items()}
        stacked = {name: torch.stack([c[name] for c in clock]) for name in clock[0]}
        return joined | {
            name: tensor.to(device or tensor.device, non_blocking=True)  # without a wait
            for name, tensor in stacked.items()
        }

    compiled_given = given

    def prepared(self, first: Mapping[str, TensorSpec], make: Callable[[], Results]) -> Results:
        """What the host makes for a computed step's graph."""
        return make()
