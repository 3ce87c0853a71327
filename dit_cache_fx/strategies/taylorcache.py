"""TaylorCache: extrapolate a cached run's result from its last computed values."""

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

#: the low band reaches up to this share of the highest frequency
CUTOFF = 0.1
AXES = ("step", "timestep")


@dataclass(frozen=True, kw_only=True)
class TaylorCache(Strategy):
    """TaylorCache: a Taylor series through the last computed values predicts the others.

    Liu et al.: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers,
    arXiv:2503.06923; the band split as in AngelSlim's TaylorCacheHelper.

    On a computed step `D[0] = x` and `D[i+1] = (D[i] - D_old[i]) / distance`; at distance d from it
    the prediction is `sum D[i] d^i / i!`. Tokens (dimension 1) are split by frequency into a low
    and a high band, each with its own order of at most `max_order`. With equal orders the split
    would change nothing and is left out.

    The `corrector` corrects a share of the error of a past interval in the coming one. On a
    computed step c after the computed step p, the values between are known better than at the time
    of their prediction: `I(k)` on the line from `x_p` to `x_c` (in the unit of `axis`), against the
    sum `P(k)` above. The sampler has added up their difference, weighted by the distance that the
    timestep moved (`dt_k`; 1 if timesteps are unknown): `E = sum of (I(k) - P(k)) dt_k over p < k <
    c`. Each prediction up to the next computed step n is increased by `corrector * E / (sum of dt_k
    over c < k < n)`. `P(k)` does not include that term, so no error is corrected twice. If n is
    unknown, since a rule decides, the last interval is used in its place. One more tensor is held
    for each value, and nothing is stored on reused steps: `E` follows from the derivatives held at
    p, and numbers.

    A `tolerance` chooses the steps. Each computed step gives the relative error of the prediction
    for it, `e = |computed - predicted| / |computed|`, after a gap g. The next gap is the longest n
    whose expected error, `e g (n / g)^3`, is within the tolerance (`n^2` for the first), and at
    most 2.5 times as long as the last. Gaps are differences of the timesteps, as shares of the
    whole way from the first to the end; of steps if the timesteps are unknown. The error is read
    once for each computed step; nothing is read on a predicted one.

    Args:
        max_order (`int`, defaults to `2`):
            The highest order of a derivative, from 0. For each value `max_order + 1` tensors of its
            shape and dtype are held.
        low_freqs_order (`int`, defaults to `2`):
            The order for the low frequencies over the tokens, from 0, capped by `max_order`.
        high_freqs_order (`int`, defaults to `2`):
            The order for the high frequencies, from 0, capped by `max_order`.
        corrector (`float`, defaults to `0.0`):
            The share of a past error to correct, from 0 (off) to 2.
        axis (`str`, defaults to `"step"`):
            The unit of distances: "step" counts steps, "timestep" uses the differences of the
            timesteps, in steps of average length (in steps if the timesteps are unknown).
        tolerance (`float`, *optional*):
            The relative error to allow in a gap, above 0. Setting it turns the rule on.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "taylorcache", computed_steps=10, corrector=0.5)
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
        """The order of each band; one band if both have the same."""
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
        """Return the new derivatives of a band, as many as `cached`."""
        return derivatives(value, cached, clock)

    def weight(self, order: int, power: Callable[[int], Tensor]) -> Tensor:
        """Return the weight of a derivative in a prediction. `power`: of the distance."""
        return power(order) / math.factorial(order)

    def _predicted(self, band: Sequence[Tensor], distance: Tensor) -> Tensor:
        total = band[0]
        for i, derivative in enumerate(band[1:], start=1):
            total = total + derivative * self.weight(i, lambda n: distance**n)
        return total

    def _bands(self, cached: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return the derivatives of each band."""
        ends = list(accumulate(order + 1 for order in self.orders))
        return [cached[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def interpolated(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
        """Return the sum over `Clock.gap` of the values between, relative to the last computed one.

        `cached`: the derivatives of the computed step before, of one band.
        """
        return slope(value, cached[0], clock) * (clock.gap[1] / 1)

    def _missed(self, value: Tensor, cached: Sequence[Tensor], clock: Clock) -> Tensor:
        """Return the sum of the errors of a band's predictions."""
        missed = self.interpolated(value, cached, clock)
        for i, derivative in enumerate(cached[1:], start=1):
            missed = missed - derivative * self.weight(i, lambda n: clock.gap[n])
        return missed

    def _correction(self, missed: Tensor, before: Tensor, clock: Clock) -> Tensor:
        """Return the term to add to predictions up to the next computed step; 0 of fewer than two.

        A second evaluation at the same step (distance 0) keeps the term of the first.
        """
        known = (clock.computed > 0) & (clock.distance > 0)
        again = (clock.computed > 0) & (clock.distance == 0)
        corrected = torch.where(known, self.corrector * missed, 0.0)
        return torch.where(again, before, corrected)

    def _check_corrector(self) -> None:
        expected = "a share from 0 (off) to 2, for example 0.5"
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
        return "; or pass a tolerance, for example tolerance=0.01"


def derivatives(value: Tensor, cached: Sequence[Tensor], clock: Clock) -> list[Tensor]:
    """Return the new `D`, as many as `cached`. An order without a predecessor is zero.

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
    """Return the change since the last computed step divided by its distance; 0 if none."""
    known = (clock.computed > 0) & (clock.distance > 0)
    return (value - last) / torch.where(known, clock.distance, math.inf)


def split_bands(value: Tensor) -> list[Tensor]:
    """Return the low and the high frequencies of `value` along dimension 1, in its own dtype.

    Contiguous, unlike the transform: layers round differently in another layout.
    """
    spectrum = torch.fft.fft(value.float(), dim=1)
    frequencies = torch.fft.fftfreq(value.shape[1], device=value.device).abs()
    low = frequencies <= CUTOFF * frequencies.max()
    low = low.reshape(1, -1, *[1] * (value.ndim - 2))
    bands = (torch.fft.ifft(spectrum * mask, dim=1).real for mask in (low, ~low))
    return [band.to(value.dtype).contiguous() for band in bands]
