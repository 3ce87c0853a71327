"""HiCache: TaylorCache with Hermite polynomials instead of powers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_cache_fx.strategies.checks import check_positive
from dit_cache_fx.strategies.taylorcache import TaylorCache


@dataclass(frozen=True, kw_only=True)
class HiCache(TaylorCache):
    """HiCache: TaylorCache with scaled Hermite polynomials instead of powers.

    Feng et al.: HiCache: Training-free Acceleration of Diffusion Models via Hermite
    Polynomial-based Feature Caching, arXiv:2508.16984, definition 2.

    The prediction at distance d is `sum D[i] / i! * sigma^i H_i(sigma d)`, with the derivatives of
    TaylorCache and the physicists' Hermite polynomials `H_i`. The other options are those of
    `TaylorCache`.

    Args:
        sigma (`float`, defaults to `0.5`):
            The scale, above 0, without unit. A smaller one changes a prediction less: order 1 goes
            `2 sigma^2` of TaylorCache's way. The paper uses 0.5.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "hicache", sigma=0.7, compute_ratio=0.3)
    """

    sigma: float = 0.5

    name: ClassVar[str] = "hicache"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("sigma", self.sigma, 0.5)

    def weight(self, order: int, power: Callable[[int], Tensor]) -> Tensor:
        terms = [
            factor * self.sigma ** (order + n) / math.factorial(order) * power(n)
            for n, factor in enumerate(hermite(order))
            if factor
        ]
        return sum(terms[1:], start=terms[0])


def hermite(order: int) -> list[int]:
    """Return the coefficients of `H_order`, the lowest power first."""
    before, now = [0], [1]
    for n in range(order):
        twice = [0, *(2 * c for c in now)]
        less = [2 * n * c for c in before] + [0] * (len(twice) - len(before))
        before, now = now, [a - b for a, b in zip(twice, less, strict=True)]
    return now
