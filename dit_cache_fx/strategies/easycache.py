"""EasyCache: compute when the expected change of the output is large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.checks import check_count, check_positive
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.ends import with_ends
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class EasyCache(Strategy):
    """EasyCache: a step computes when the output is expected to have changed.

    Zhou et al.: Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
    Caching, arXiv:2507.02860.

    Let x be the model's sample, y its output, and c, b the newest two computed steps. The rate of
    transformation is `mean|y_c - y_b| / mean|x_c - x_b|`. Each step adds its expected change, `rate
    mean|x - x_previous| / mean|y_c|`, to a sum. A step computes when the sum reaches `threshold`,
    and the sum starts again from 0. On any other step the whole model returns `x + (y_c - x_c)`.
    Each branch of CFG decides by itself. If the sum is not finite, the step computes.

    Args:
        threshold (`float`, defaults to `0.05`):
            The summed relative change of the output at which a step computes, above 0, without
            unit: `thresh` of the published code, which uses 0.025 for HunyuanVideo and 0.05 for
            Wan.
        warmup_steps (`int`, defaults to `10`):
            The number of steps at the start of a generation that always compute: `ret_steps` of the
            published code. The last step also computes if the number of steps is known
            (`num_steps`).

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "easycache", threshold=0.025, warmup_steps=5)
    """

    threshold: float = 0.05
    warmup_steps: int = 10

    name: ClassVar[str] = "easycache"
    reads_run_input: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    bears_nans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("threshold", self.threshold, 0.05)
        check_count("warmup_steps", self.warmup_steps, 0)
        if self.no_cache_block_id is not None:
            ids, expected = self.no_cache_block_id, "None: EasyCache reuses the whole model at once"
            raise OptionError("no_cache_block_id", ids, expected)

    @cached_property
    def plan(self) -> Schedule | None:
        return with_ends(super().plan, self.warmup_steps, last=1)

    def slots(self) -> int:
        return 2

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        assert run_input is not None
        return [value, run_input]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        assert run_input is not None
        return run_input + (cached[0] - cached[1])

    def measure(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Tensor:
        """Return the rate of transformation, and the size of the output."""
        assert run_input is not None
        changes = (value - cached[0]).abs(), (run_input - cached[1]).abs()
        given, taken, size = self.means(*changes, value.abs())
        rate = given / taken
        known = torch.where(clock.computed > 0, rate.double(), math.nan)
        return torch.stack([known, size.double()])

    @property
    def has_rule(self) -> bool:
        return True

    def looks_at(self) -> tuple[str, ...]:
        return "sample", "measured"

    def init_state(self, signal: tuple[Tensor, Tensor]) -> RuleState:
        """Return the sample, and the sum before and after a computed step has set it to 0."""
        zero = torch.zeros((), dtype=torch.float64, device=signal[0].device)
        return signal[0], zero, zero.clone()

    def should_compute(
        self, signal: tuple[Tensor, Tensor], state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        (sample, measured), (previous, _, total) = signal, state
        rate, size = measured.flatten().unbind()
        (moved,) = self.means((sample - previous).abs())
        total = total + rate * moved.double() / size
        compute = forced | ~(total < self.threshold)
        return compute, (sample, total, torch.where(compute, 0.0, total))

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        return state[1] if state else None
