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
    """What the program of one row alone holds, beside one of `count` rows.

    Each row has a clock of its own, so the clock's tensors have a first dimension of rows, and the
    strategy's functions are mapped over the rows.
    """

    count: int
    cached: Mapping[str, TensorSpec]

    def spec(self, name: str) -> TensorSpec:
        """What a row alone holds under this name."""
        if name not in self.cached:
            raise CaptureError(
                f"several sessions in one call hold {name}, and one session alone does not: they "
                "cannot be answered together. Call each session by itself"
            )
        return self.cached[name]

    def place(self, name: str, many: TensorSpec) -> RowPlace:
        """Where the rows are in what is held under this name."""
        return place_of(name, self.spec(name), many, self.count)

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
