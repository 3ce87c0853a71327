"""Deviations of the published helpers, for results that must not change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_cache_fx.strategies import Clock, TaylorCache, TeaCache


class StoredInputTeaCache(TeaCache):
    """TeaCache that adds the residual to the input from which it was computed."""

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if run_input is None else run_input + (value - run_input)]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        return cached[0]


class LateTaylorCache(TaylorCache):
    """TaylorCache that ignores a generation's first computed step in its differences."""

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        later = clock._replace(computed=(clock.computed - 1).clamp(min=0))
        return super().store(cached, value, run_input, later)
