"""What several strategies share: the residual of a run is held, and added to this step's stream."""

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

    reads_start: ClassVar[bool] = True

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if start is None else value - start]

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        return held[0] if start is None else start + held[0]
