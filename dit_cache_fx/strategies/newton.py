"""NewtonCache: TaylorCache on the polynomial through the last computed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.taylorcache import TaylorCache, slope


@dataclass(frozen=True, kw_only=True)
class NewtonCache(TaylorCache):
    """TaylorCache with the derivatives of the parabola through the last three computed values.

    The published differences of order 2 are those of the middle of an interval, taken for those of
    its end. They are off where two intervals differ in length. With Newton's divided differences
    (`s` and `s_old` the slopes over the last two intervals, of lengths g and g_old)
    `D[2] = 2 (s - s_old) / (g + g_old)` and `D[1] = s + D[2] g / 2`, at the newest computed value.
    The rest is TaylorCache's, and with order 1 the two are the same.

    The options are those of `TaylorCache`, with orders of at most 2.

    Example:
        >>> dit_cache_fx.apply(model, "newtoncache", computed_steps=10)
    """

    name: ClassVar[str] = "newtoncache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.orders) > 2:
            raise OptionError("max_order", self.max_order, "at most 2 here")

    def differences(self, value: Tensor, held: Sequence[Tensor], clock: Clock) -> list[Tensor]:
        if len(held) < 3:
            return super().differences(value, held, clock)
        last, first, second = held
        now, before = slope(value, last, clock), first - second * (clock.reach / 2)
        known = (clock.computed > 1) & (clock.distance > 0)
        bend = (now - before) / torch.where(known, clock.distance + clock.reach, torch.inf)
        again = (clock.computed > 0) & (clock.distance == 0)
        new = (now + bend * clock.distance, 2 * bend)
        return [value, *(torch.where(again, a, b) for a, b in zip(held[1:], new, strict=True))]
