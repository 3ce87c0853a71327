"""Exponential extrapolation: dynamic mode decomposition with a single mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.taylorcache import derivatives


@dataclass(frozen=True, kw_only=True)
class Exponential(Strategy):
    """Exponential extrapolation: values follow `a + b exp(rate d)`, one `rate` per batch item.

    Dynamic mode decomposition (Schmid: Dynamic mode decomposition of numerical and experimental
    data, J. Fluid Mech. 656, 2010), the DMD calibrator of cache-dit, fits several such modes to a
    window of up to 6 equally spaced values. This strategy uses the first two derivatives of
    TaylorCache and one mode: at distance d it predicts `x + D[1] (exp(rate d) - 1) / rate`. The
    `rate` is the best fit to `D[2] = rate D[1]` over all elements, and at most 0, so that a
    prediction never diverges. Three tensors are held for each value. The options are those of
    `Strategy`.

    Example:
        >>> cached = dit_cache_fx.apply(model, "exponential", compute_ratio=0.3)
    """

    name: ClassVar[str] = "exponential"
    action: ClassVar[str] = "predicted"

    def slots(self) -> int:
        return 3

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return derivatives(value, cached, clock)

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        value, slope, curvature = cached
        way = growth(rate_of(slope, curvature), clock.distance)
        return value + slope * way.to(value.dtype)


def rate_of(slope: Tensor, curvature: Tensor) -> Tensor:
    """Return, for each item of the batch, the rate at which the slope fades."""
    first, second = slope.float(), curvature.float()
    dims = [*range(1, first.ndim)] or [0]
    squares = (first * first).sum(dims, keepdim=True)
    products = (first * second).sum(dims, keepdim=True)
    return torch.where(squares > 0, products / squares, 0.0).clamp(max=0.0)


def growth(rate: Tensor, distance: Tensor) -> Tensor:
    """Return `(exp(rate d) - 1) / rate`; the distance itself if the rate is 0."""
    fades = rate < 0
    return torch.where(fades, torch.expm1(rate * distance) / torch.where(fades, rate, -1), distance)
