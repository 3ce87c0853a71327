"""Base of the strategies that hold the residual of a run and add it to this step's stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dit_cache_fx.errors import OptionError
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


def check_count(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raise `OptionError` if the value is no integer from `least` on."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(name, value, f"an integer from {least}" + optional * ", or None")


def check_positive(name: str, value: Any, example: float, optional: bool = False) -> None:
    """Raise `OptionError` if the value is no finite number above 0."""
    if optional and value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value > 0 or not math.isfinite(value):
        raise OptionError(name, value, f"a number above 0, for example {example:g}")
