"""What the published helpers do otherwise, for results that must stay as they were."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_cache_fx.strategies import Clock, TaylorCache, TeaCache


class StoredInputTeaCache(TeaCache):
    """The residual is added to the input that it was taken from."""

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        return [value if run_input is None else run_input + (value - run_input)]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        return cached[0]


class LateTaylorCache(TaylorCache):
    """A generation's first computed step does not count: differences start from the second."""

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        later = clock._replace(computed=(clock.computed - 1).clamp(min=0))
        return super().store(cached, value, run_input, later)
