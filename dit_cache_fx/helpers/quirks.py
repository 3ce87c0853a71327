"""Deviations of the published helpers, for results that must not change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_cache_fx.strategies import Clock, TaylorCache, TeaCache


class StoredInputTeaCache(TeaCache):
    """TeaCache that adds the residual to the input from which it was computed."""

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if start is None else start + (value - start)]

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        return held[0]


class LateTaylorCache(TaylorCache):
    """TaylorCache that ignores a generation's first computed step in its differences."""

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        later = clock._replace(computed=(clock.computed - 1).clamp(min=0))
        return super().store(held, value, start, later)
