"""DeepCache: hold a cached run's result on a computed step, and return it on reused steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.clock import Clock


@dataclass(frozen=True, kw_only=True)
class DeepCache(Strategy):
    """DeepCache: a reused step returns the result of the newest computed step.

    Ma, Fang, Wang: DeepCache: Accelerating Diffusion Models for Free, arXiv:2312.00858. Its unit is
    the transformer block, as in AngelSlim's DeepCacheHelper. One tensor is held for each value that
    leaves a cached run. The options are those of `Strategy`.

    Example:
        >>> cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(0, 50, 2))
    """

    name: ClassVar[str] = "deepcache"

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        return cached[0]
