"""MagCache: compute where the magnitude of the blocks' residual is known to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.checks import check_count, check_positive, check_range
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.combined import AnyOf
from dit_cache_fx.strategies.even import EvenSteps
from dit_cache_fx.strategies.magnitudes import MagnitudeSteps
from dit_cache_fx.strategies.residual import ResidualCache
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class MagCache(ResidualCache):
    """MagCache: known magnitudes of the residual select the steps to compute.

    Ma et al.: MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv:2506.09045; with
    the options and the defaults of diffusers' `MagCacheConfig`.

    The `mag_ratios` give the change in magnitude of the residual of all blocks from one step to the
    next. The error of reuse is estimated from their product since the newest computed step: `|1 -
    product|`, summed over the reused steps. The ratios alone determine the steps, so nothing is
    read from the model. A reused step adds the residual to its own stream.

    Args:
        mag_ratios (`Sequence[float]`, *optional*):
            A ratio above 0 for each step, for one model and one sampler: use published ratios, or
            measure them with `calibrate=True`. If `num_steps` is another number, each step uses the
            nearest ratio. Required unless `calibrate` is set.
        threshold (`float`, defaults to `0.06`):
            The estimated relative error above which a step computes.
        max_skip_steps (`int`, defaults to `3`):
            The largest number of steps reused one after another.
        retention_ratio (`float`, defaults to `0.2`):
            The share of the steps at the start of a generation that always compute, from 0 to 1.
        calibrate (`bool`, defaults to `False`):
            Compute every step, and measure the ratios for the timeline of `cache_report()`.

    Raises:
        OptionError: An option has a value that cannot work, or there are no ratios.

    Example:
        >>> cached = dit_cache_fx.apply(model, "magcache", calibrate=True)
        >>> image = generate(cached)
        >>> ratios = [record.measured for record in cached.cache_report().timeline]
        >>> cached = dit_cache_fx.apply(model, "magcache", mag_ratios=ratios)
    """

    mag_ratios: Sequence[float] | None = None
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    calibrate: bool = False

    name: ClassVar[str] = "magcache"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mag_ratios", _ratios(self.mag_ratios, self.calibrate))
        check_positive("threshold", self.threshold, 0.06)
        check_count("max_skip_steps", self.max_skip_steps, 0)
        expected = "a share of the steps from 0 to 1"
        check_range("retention_ratio", self.retention_ratio, 0, 1, expected)
        super().__post_init__()

    @cached_property
    def plan(self) -> Schedule | None:
        own = EvenSteps(1.0) if self.calibrate else self._steps()
        given = super().plan
        return own if given is None else AnyOf((own, given))

    def _steps(self) -> MagnitudeSteps:
        assert isinstance(self.mag_ratios, tuple)
        options = self.threshold, self.max_skip_steps, self.retention_ratio
        return MagnitudeSteps(self.mag_ratios, *options)

    def measure(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Tensor | None:
        """Return the mean ratio of a token's residual to that of the step before."""
        if not self.calibrate:
            return None
        residual = self.store(cached, value, run_input, clock)[0]
        new, old = (r.double().norm(dim=-1) for r in (residual, cached[0]))
        (ratio,) = self.means(new / (old + 1e-8))
        return torch.where(clock.computed > 0, ratio, 1.0).reshape(1)

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        return None if measured is None else measured.mean()


def _ratios(value: Any, calibrate: bool) -> tuple[float, ...] | None:
    expected = "a finite ratio above 0 for each step"
    if value is None:
        if calibrate:
            return None
        raise OptionError(
            "mag_ratios", value, f"{expected}; or pass calibrate=True to measure them"
        )
    try:
        ratios = tuple(float(ratio) for ratio in value)
    except (TypeError, ValueError):
        raise OptionError("mag_ratios", value, expected) from None
    if not ratios or not all(math.isfinite(r) and r > 0 for r in ratios):
        raise OptionError("mag_ratios", value, expected)
    return ratios
