"""TaylorCache: a cached run's result is extrapolated from its last computed values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Clock, RuleState, Strategy
from dit_cache_fx.strategies.residual import check_positive
from dit_cache_fx.strategies.tolerance import expected_error, measured_error

#: share of the highest frequency up to which a frequency is in the low band
CUTOFF = 0.1


@dataclass(frozen=True, kw_only=True)
class TaylorCache(Strategy):
    """Liu et al.: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers,
    arXiv:2503.06923; the band split as in AngelSlim's TaylorCacheHelper.

    On a computed step `D[0] = x` and `D[i+1] = (D[i] - D_old[i]) / distance`; at distance d from
    it the prediction is `sum D[i] d^i / i!`. Tokens (dimension 1) are split by frequency into a
    low and a high band with orders of their own, at most `max_order`; with equal orders the split
    changes nothing and is left out.

    `tolerance` chooses the steps: each computed step tells the relative error of the prediction for
    it, `e = |computed - predicted| / |computed|`, after a gap of g steps. The next gap is the
    longest of n steps whose expected error, `e g (n / g)^3`, is within the tolerance; it is at most
    three times as long as the last. The error is read once for each computed step, and nothing is
    read on a predicted one.
    """

    max_order: int = 2
    low_freqs_order: int = 2
    high_freqs_order: int = 2
    tolerance: float | None = None

    name: ClassVar[str] = "taylorcache"
    action: ClassVar[str] = "predicted"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("max_order", "low_freqs_order", "high_freqs_order"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(option, value, "an integer from 0")
        check_positive("tolerance", self.tolerance, 0.5, optional=True)

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of each band; one band where both have the same."""
        low, high = (
            min(order, self.max_order) for order in (self.low_freqs_order, self.high_freqs_order)
        )
        return (low,) if low == high else (low, high)

    def slots(self) -> int:
        return sum(order + 1 for order in self.orders)

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        bands = [value] if len(self.orders) == 1 else split_bands(value)
        new: list[Tensor] = []
        for order, band in zip(self.orders, bands, strict=True):
            new += derivatives(band, held[len(new) : len(new) + order + 1], clock)
        return new

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        total: Tensor | None = None
        first = 0
        for order in self.orders:
            band = taylor_sum(held[first : first + order + 1], clock.distance)
            total = band if total is None else total + band
            first += order + 1
        assert total is not None
        return total

    # --- the tolerance ---------------------------------------------------------------------

    @property
    def has_rule(self) -> bool:
        return self.tolerance is not None

    @property
    def threshold(self) -> float | None:
        return self.tolerance

    def looks_at(self) -> tuple[str, ...]:
        return "distance", "measured"

    def measure(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Tensor | None:
        if self.tolerance is None:
            return None
        predicted = self.reuse(held, start, clock)
        return measured_error(value, predicted, clock.distance, clock.computed)

    def init_state(self, signal: tuple[Tensor, Tensor]) -> RuleState:
        return (torch.zeros((), dtype=torch.float64, device=signal[1].device),)

    def should_compute(
        self, signal: tuple[Tensor, Tensor], state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        assert self.tolerance is not None
        distance, measured = signal
        error = expected_error(measured, distance)
        return forced | ~(error <= self.tolerance), (error,)

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        return state[0] if state else None

    def _rule_hint(self) -> str:
        return "; or give tolerance=0.5, say"


def derivatives(value: Tensor, held: Sequence[Tensor], clock: Clock) -> list[Tensor]:
    """The new `D`, as many as `held`. An order that has no predecessor yet is zero.

    A second evaluation at the same step (distance 0) keeps the differences of the first.
    """
    new = [value]
    for i in range(len(held) - 1):
        known = (clock.computed > i) & (clock.distance > 0)
        difference = (new[i] - held[i]) / torch.where(known, clock.distance, math.inf)
        again = (clock.computed > 0) & (clock.distance == 0)
        new.append(torch.where(again, held[i + 1], difference))
    return new


def taylor_sum(held: Sequence[Tensor], distance: Tensor) -> Tensor:
    """`sum D[i] distance^i / i!`."""
    total = held[0]
    for i, d in enumerate(held[1:], start=1):
        total = total + d * (distance**i / math.factorial(i))
    return total


def split_bands(value: Tensor) -> list[Tensor]:
    """The low and the high frequencies of `value` along dimension 1, in its own dtype."""
    spectrum = torch.fft.fft(value.float(), dim=1)
    frequencies = torch.fft.fftfreq(value.shape[1], device=value.device).abs()
    low = frequencies <= CUTOFF * frequencies.max()
    low = low.reshape(1, -1, *[1] * (value.ndim - 2))
    return [torch.fft.ifft(spectrum * mask, dim=1).real.to(value.dtype) for mask in (low, ~low)]
