"""Base of the strategies that cache the residual of a run and add it to this step's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.clock import Clock


@dataclass(frozen=True, kw_only=True)
class ResidualCache(Strategy):
    """Base of the strategies that hold a residual; a subclass decides when to compute."""

    reads_run_input: ClassVar[bool] = True

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if run_input is None else value - run_input]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        return cached[0] if run_input is None else run_input + cached[0]
