"""TaylorCache: a cached run's result is extrapolated from its last computed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.checks import check_count, check_positive, check_range
from dit_cache_fx.strategies.clock import MOMENTS, Clock
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.tolerance import expected_error, measured_error

#: share of the highest frequency up to which a frequency is in the low band
CUTOFF = 0.1
AXES = ("step", "timestep")


@dataclass(frozen=True, kw_only=True)
class TaylorCache(Strategy):
    """TaylorCache: a Taylor series through the last computed values predicts the others.

    Liu et al.: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers,
    arXiv:2503.06923; the band split as in AngelSlim's TaylorCacheHelper.

    On a computed step `D[0] = x` and `D[i+1] = (D[i] - D_old[i]) / distance`; at distance d from
    it the prediction is `sum D[i] d^i / i!`. Tokens (dimension 1) are split by frequency into a
    low and a high band with orders of their own, at most `max_order`. With equal orders the split
    would change nothing and is left out.

    The `corrector` puts right a share of the error of a past interval in the coming one. On a
    computed step c after the computed step p, the values between are known better than when they
    were predicted: `I(k)` on the line from `x_p` to `x_c` (in the unit of `axis`), against the sum
    `P(k)` above. The sampler has added up their difference, weighted by how far the timestep moved
    (`dt_k`; 1 where timesteps are not known): `E = sum of (I(k) - P(k)) dt_k over p < k < c`. Each
    prediction up to the next computed step n gets `corrector * E / (sum of dt_k over c < k < n)`
    added. `P(k)` is without such an addition, so nothing is put right twice. Where n is not known,
    since a rule decides, the last interval stands for it. One more tensor is held for each value,
    and nothing is stored on reused steps: `E` follows from the derivatives held at p, and numbers.

    A `tolerance` chooses the steps. Each computed step tells the relative error of the prediction
    for it, `e = |computed - predicted| / |computed|`, after a gap g. The next gap is the longest n
    whose expected error, `e g (n / g)^3`, is within the tolerance (`n^2` for the first), and at
    most 2.5 times as long as the last. Gaps are differences of the timesteps, as shares of the
    whole way from the first to the end; of steps where the timesteps are not known. The error is
    read once for each computed step; nothing is read on a predicted one.

    Args:
        max_order (`int`, defaults to `2`):
            The highest order of a derivative. Each value takes `max_order + 1` tensors.
        low_freqs_order (`int`, defaults to `2`):
            The order for the low frequencies over the tokens, capped by `max_order`.
        high_freqs_order (`int`, defaults to `2`):
            The order for the high frequencies, capped by `max_order`.
        corrector (`float`, defaults to `0.0`):
            The share of a past error to put right, from 0 (off) to 2.
        axis (`str`, defaults to `"step"`):
            The unit of distances: "step" counts steps, "timestep" takes the differences of the
            timesteps, in steps of the average length (in steps where the timesteps are not known).
        tolerance (`float`, *optional*):
            The relative error to allow in a gap, above 0. It turns the rule on.

    Example:
        >>> dit_cache_fx.apply(model, "taylorcache", computed_steps=10, max_order=1, corrector=0.5)
    """

    max_order: int = 2
    low_freqs_order: int = 2
    high_freqs_order: int = 2
    corrector: float = 0.0
    axis: str = "step"
    tolerance: float | None = None

    name: ClassVar[str] = "taylorcache"
    action: ClassVar[str] = "predicted"
    bears_nans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("max_order", "low_freqs_order", "high_freqs_order"):
            check_count(option, getattr(self, option), 0)
        check_positive("tolerance", self.tolerance, 0.01, optional=True)
        self._check_corrector()
        if self.axis not in AXES:
            raise OptionError("axis", self.axis, f"one of {list(AXES)}")

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of each band; one band where both have the same."""
        low, high = (
            min(order, self.max_order) for order in (self.low_freqs_order, self.high_freqs_order)
        )
        return (low,) if low == high else (low, high)

    def slots(self) -> int:
        return sum(order + 1 for order in self.orders) + bool(self.corrector)

    @property
    def by_timestep(self) -> bool:
        return self.axis == "timestep"

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        bands = [value] if len(self.orders) == 1 else split_bands(value)
        pairs = list(zip(bands, self._bands(cached), strict=True))
        new = [tensor for band, old in pairs for tensor in self.differences(band, old, clock)]
        if self.corrector:
            missed = [self._missed(band, old, clock) for band, old in pairs]
            new.append(self._correction(sum(missed[1:], start=missed[0]), cached[-1], clock))
        return new

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        first, *others = [self._predicted(band, clock.distance) for band in self._bands(cached)]
        total = sum(others, start=first)
        return total + cached[-1] if self.corrector else total

    def differences(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> list[Tensor]:
        """The new derivatives of a band, as many as `cached`."""
        return derivatives(value, cached, clock)

    def weight(self, order: int, power: Callable[[int], Tensor]) -> Tensor:
        """The weight of a derivative in a prediction. `power`: of the distance."""
        return power(order) / math.factorial(order)

    def _predicted(self, band: Sequence[Tensor], distance: Tensor) -> Tensor:
        total = band[0]
        for i, derivative in enumerate(band[1:], start=1):
            total = total + derivative * self.weight(i, lambda n: distance**n)
        return total

    def _bands(self, cached: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The derivatives of each band."""
        ends = list(accumulate(order + 1 for order in self.orders))
        return [cached[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def interpolated(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
        """The sum over `Clock.gap` of how far the values between lay from the one computed before.

        `cached`: the derivatives of the computed step before, of one band.
        """
        return slope(value, cached[0], clock) * (clock.gap[1] / 1)

    def _missed(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
        """The sum of what the predictions of a band have missed."""
        missed = self.interpolated(value, cached, clock)
        for i, derivative in enumerate(cached[1:], start=1):
            missed = missed - derivative * self.weight(i, lambda n: clock.gap[n])
        return missed

    def _correction(self, missed: Tensor, before: Tensor, clock: Clock) -> Tensor:
        """What to add to the predictions up to the next computed step; 0 of fewer than two.

        A second evaluation at the same step (distance 0) keeps that of the first.
        """
        known = (clock.computed > 0) & (clock.distance > 0)
        again = (clock.computed > 0) & (clock.distance == 0)
        corrected = torch.where(known, self.corrector * missed, 0.0)
        return torch.where(again, before, corrected)

    def _check_corrector(self) -> None:
        expected = "a share from 0 (off) to 2, for instance 0.5"
        check_range("corrector", self.corrector, 0, 2, expected)
        if self.corrector and max(self.orders) >= MOMENTS:
            most = f"at most {MOMENTS - 1} with a corrector"
            raise OptionError("max_order", self.max_order, most)

    # --- the tolerance ---------------------------------------------------------------------

    @property
    def has_rule(self) -> bool:
        return self.tolerance is not None

    @property
    def threshold(self) -> float | None:
        return self.tolerance

    def looks_at(self) -> tuple[str, ...]:
        return "way", "measured"

    def measure(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Tensor | None:
        if self.tolerance is None:
            return None
        predicted = self.reuse(cached, run_input, clock)
        missed, size = self.norms(value - predicted, value)
        return measured_error(missed, size, clock)

    def init_state(self, signal: tuple[Tensor, Tensor]) -> RuleState:
        return (torch.zeros((), dtype=torch.float64, device=signal[1].device),)

    def should_compute(
        self, signal: tuple[Tensor, Tensor], state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        assert self.tolerance is not None
        way, measured = signal
        error = expected_error(measured, way[1])
        return forced | ~(error <= self.tolerance), (error,)

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        return state[0] if state else None

    def _rule_hint(self) -> str:
        return "; or give tolerance=0.01, say"


def derivatives(value: Tensor, cached: Sequence[Tensor], clock: Clock) -> list[Tensor]:
    """The new `D`, as many as `cached`. An order that has no predecessor yet is zero.

    A second evaluation at the same step (distance 0) keeps the differences of the first.
    """
    new = [value]
    for i in range(len(cached) - 1):
        known = (clock.computed > i) & (clock.distance > 0)
        difference = (new[i] - cached[i]) / torch.where(known, clock.distance, math.inf)
        again = (clock.computed > 0) & (clock.distance == 0)
        new.append(torch.where(again, cached[i + 1], difference))
    return new


def slope(value: Tensor, last: Tensor, clock: Clock) -> Tensor:
    """The change since the last computed step by its distance; 0 where there is none."""
    known = (clock.computed > 0) & (clock.distance > 0)
    return (value - last) / torch.where(known, clock.distance, math.inf)


def split_bands(value: Tensor) -> list[Tensor]:
    """The low and the high frequencies of `value` along dimension 1, in its own dtype."""
    spectrum = torch.fft.fft(value.float(), dim=1)
    frequencies = torch.fft.fftfreq(value.shape[1], device=value.device).abs()
    low = frequencies <= CUTOFF * frequencies.max()
    low = low.reshape(1, -1, *[1] * (value.ndim - 2))
    return [torch.fft.ifft(spectrum * mask, dim=1).real.to(value.dtype) for mask in (low, ~low)]
