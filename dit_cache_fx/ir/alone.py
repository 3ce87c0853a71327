"""A program for several rows, each of them at a step of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Alone:
    """What leaves the runs of a program for one row alone, beside one for `count` rows.

    Each row has a clock of its own, so the clock's tensors have a first dimension of rows, and the
    strategy's functions are mapped over the rows.

    `values`: by run and place. Names do not tell them: a model that goes through the rows in a loop
    has another number of nodes for each number of rows.
    """

    count: int
    values: Mapping[tuple[int, int], TensorSpec]

    def spec(self, run: int, index: int, name: str) -> TensorSpec:
        """The value of one row alone that `name` is of all rows."""
        if (run, index) not in self.values:
            raise CaptureError(
                f"several sessions in one call hold {name}, and one session alone does not: they "
                "cannot be answered together. Call each session by itself"
            )
        return self.values[run, index]

    def clock(self, spec: TensorSpec, device: torch.device) -> TensorSpec:
        """A tensor of the clock, for each row."""
        return TensorSpec(torch.Size([self.count, *spec.shape]), spec.dtype, device)


def place_of(name: str, one: TensorSpec, many: TensorSpec, count: int) -> RowPlace:
    """Where `many` has `count` rows. Raises `CaptureError` where none can be told."""
    place = RowPlace.between(one, many, count)
    if place is None:
        raise CaptureError(
            f"{name} is {one} for one session and {many} for {count}: it has no dimension of "
            "sessions, so they cannot be answered together. Call each session by itself"
        )
    return place
