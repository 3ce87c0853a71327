"""The shapes of a batched program's clock and cached tensors when each row has its own step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.values.rows import RowPlace
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Alone:
    """Tensor specs of the values that leave the runs for one row, beside a program of `count` rows.

    Each row has a clock of its own, so the clock's tensors have a first dimension of rows, and the
    strategy's functions are mapped over the rows.

    `values`: by run and place. Names do not tell them: a model that goes through the rows in a loop
    has another number of nodes for each number of rows.
    """

    count: int
    values: Mapping[tuple[int, int], TensorSpec]

    def spec(self, run: int, index: int, name: str) -> TensorSpec:
        """Return the spec for a single row of the value that all rows have under this name."""
        if (run, index) not in self.values:
            raise CaptureError(
                f"several sessions in one call hold {name}, and a single session does not: they "
                "cannot run as one batch. Call each session by itself"
            )
        return self.values[run, index]

    def clock(self, spec: TensorSpec, device: torch.device) -> TensorSpec:
        """Return the spec of a clock tensor with an entry for each row."""
        return TensorSpec(torch.Size([self.count, *spec.shape]), spec.dtype, device)


def place_of(name: str, one: TensorSpec, many: TensorSpec, count: int) -> RowPlace:
    """Find the dimension of `count` rows in `many`. Raises `CaptureError` if there is none."""
    place = RowPlace.between(one, many, count)
    if place is None:
        raise CaptureError(
            f"{name} is {one} for one session and {many} for {count}: it has no dimension of "
            "sessions, so they cannot run as one batch. Call each session by itself"
        )
    return place
