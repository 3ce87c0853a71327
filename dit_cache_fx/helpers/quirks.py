"""What the published helpers do otherwise, for results that must stay as they were."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_cache_fx.strategies import Clock, TaylorCache, TeaCache


class StoredInputTeaCache(TeaCache):
    """The residual is added to the input that it was taken from."""

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if start is None else start + (value - start)]

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        return held[0]


class LateTaylorCache(TaylorCache):
    """A generation's first computed step does not count: differences start from the second."""

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        later = clock._replace(computed=(clock.computed - 1).clamp(min=0))
        return super().store(held, value, start, later)
