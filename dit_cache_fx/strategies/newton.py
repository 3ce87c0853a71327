"""NewtonCache: TaylorCache on the polynomial through the last computed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.checks import check_range
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.taylorcache import TaylorCache, slope


@dataclass(frozen=True, kw_only=True)
class NewtonCache(TaylorCache):
    """NewtonCache: TaylorCache with a parabola through three computed values, and a corrector.

    The published differences of order 2 belong to the middle of an interval and are used at its
    end. They are inaccurate if two intervals differ in length. With Newton's divided differences
    (`s` and `s_old` the slopes over the last two intervals, of lengths g and g_old, and `b = (s -
    s_old) / (g + g_old)`) the derivatives at the newest computed value are `D[2] = 2 b` and `D[1] =
    s + b g`. Computed values scatter too much for a parabola that far ahead, so predictions follow
    only a share of its bend: `curvature * b` instead of b. With order 1 they equal TaylorCache's.

    The corrector is TaylorCache's with two changes. `I(k)`, the values between two computed ones,
    lies on the same parabola instead of a line: `x_p + s d + b d (d - g)` at distance d from p. And
    the corrected share fades: `corrector * (1 - coming / left)`. Here the timestep moves by
    `coming` up to the next computed step, and by `left` up to the end of the generation. The rest
    corrects itself, since the model of a denoising flow sees the sample as it is: in the last
    interval, all of it.

    The other options are those of `TaylorCache`, with orders of at most 2.

    Args:
        corrector (`float`, defaults to `1.0`):
            The share of a past error to correct, from 0 (off) to 2.
        curvature (`float`, defaults to `0.5`):
            The share of the parabola's bend to follow, from 0 (a line) to 1 (the parabola).

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "newtoncache", computed_steps=10)
    """

    corrector: float = 1.0
    curvature: float = 0.5

    name: ClassVar[str] = "newtoncache"
    fading: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.orders) > 2:
            raise OptionError("max_order", self.max_order, "at most 2 for newtoncache")
        expected = "a share from 0 (a line) to 1 (the parabola)"
        check_range("curvature", self.curvature, 0, 1, expected)

    def differences(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> list[Tensor]:
        if len(cached) < 3:
            return super().differences(value, cached, clock)
        now = slope(value, cached[0], clock)
        bend = self.curvature * second_difference(value, cached, clock)
        new = (now + bend * clock.distance, 2 * bend)
        again = (clock.computed > 0) & (clock.distance == 0)
        return [value, *(torch.where(again, a, b) for a, b in zip(cached[1:], new, strict=True))]

    def interpolated(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
        line = super().interpolated(value, cached, clock)
        if len(cached) < 2:
            return line
        bend = second_difference(value, cached, clock)
        return line + bend * (clock.gap[2] - clock.gap[1] * clock.distance)


def second_difference(value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
    """Return Newton's second divided difference of the last three computed values; 0 for fewer.

    `cached`: of the computed step before; its derivatives give the slope up to that step.
    """
    last, first, *second = cached
    before = first - second[0] * (clock.reach / 2) if second else first
    known = (clock.computed > 1) & (clock.distance > 0)
    return (slope(value, last, clock) - before) / torch.where(
        known, clock.distance + clock.reach, torch.inf
    )
