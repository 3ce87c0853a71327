"""FirstBlockCache: compute when the residual of the first blocks has changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dit_cache_fx.strategies.checks import check_count, check_positive
from dit_cache_fx.strategies.ends import with_ends
from dit_cache_fx.strategies.residual import ResidualCache
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(ResidualCache):
    """FirstBlockCache: a step computes when the residual of the first blocks has changed.

    The first-block cache of ParaAttention and diffusers, and DBCache of cache-dit. The first blocks
    run on every step. A step computes when the residual r of these blocks (their output minus their
    input) has changed by at least `threshold` since the newest computed step: `mean|r - r_computed|
    / mean|r_computed|`. Any other step adds the residual of the other blocks from the newest
    computed step. If the change is not finite, the step computes.

    Args:
        threshold (`float`, defaults to `0.05`):
            The relative change at which a step computes, above 0, without unit: `threshold` of
            diffusers' `FirstBlockCacheConfig`, `residual_diff_threshold` of cache-dit's
            `DBCacheConfig`.
        first_blocks (`int`, defaults to `1`):
            The number of blocks at the model's head that always run (`Fn_compute_blocks`), at least
            1.
        last_blocks (`int`, defaults to `0`):
            The number of blocks at the model's end that always run (`Bn_compute_blocks`).
        warmup_steps (`int`, defaults to `0`):
            The number of steps at the start of a generation that always compute
            (`max_warmup_steps`).
        max_reused_in_a_row (`int`, *optional*):
            The largest number of steps reused one after another (`max_continuous_cached_steps`). A
            computed step starts the count again.
        max_reused (`int`, *optional*):
            The largest number of steps reused in a generation (`max_cached_steps`).
        max_accumulated (`float`, *optional*):
            When the sum of all changes in a generation reaches this number, every further step
            computes (`max_accumulated_residual_diff_threshold`).

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "firstblockcache", threshold=0.08, first_blocks=2)
    """

    threshold: float = 0.05
    first_blocks: int = 1
    last_blocks: int = 0
    warmup_steps: int = 0
    max_reused_in_a_row: int | None = None
    max_reused: int | None = None
    max_accumulated: float | None = None

    name: ClassVar[str] = "firstblockcache"
    every_stream: ClassVar[bool] = True
    bears_nans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("threshold", self.threshold, 0.05)
        check_count("first_blocks", self.first_blocks, 1)
        for option in ("last_blocks", "warmup_steps"):
            check_count(option, getattr(self, option), 0)
        for option in ("max_reused_in_a_row", "max_reused"):
            check_count(option, getattr(self, option), 0, optional=True)
        check_positive("max_accumulated", self.max_accumulated, 1.0, optional=True)

    def always_runs(self, position: int, blocks: int) -> bool:
        return position < self.first_blocks or position >= blocks - self.last_blocks

    @cached_property
    def plan(self) -> Schedule | None:
        return with_ends(super().plan, self.warmup_steps)

    @property
    def has_rule(self) -> bool:
        return True

    def looks_at(self) -> str:
        return "residual"

    def init_state(self, signal: Tensor) -> RuleState:
        """Return the computed residual; change; sum of changes; reused steps: in a row, all."""
        zero = torch.zeros((), dtype=torch.float64, device=signal.device)
        return signal, *(zero.clone() for _ in range(4))

    def should_compute(
        self, signal: Tensor, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        previous, _, total, in_a_row, reused = state
        moved, size = self.means((signal - previous).abs(), previous.abs())
        change = (moved / size).double()
        limited = forced | self._limited(total, in_a_row, reused)
        compute = limited | ~(change < self.threshold)
        counts = ~limited & change.isfinite()
        return compute, (
            torch.where(compute, signal, previous),
            change,
            total + torch.where(counts, change, 0.0),
            torch.where(compute, 0.0, in_a_row + 1),
            torch.where(compute, reused, reused + 1),
        )

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        return state[1] if state else None

    def _limited(self, total: Tensor, in_a_row: Tensor, reused: Tensor) -> Tensor:
        """Return whether a limit is reached, before this step's change is added."""
        limits = (self.max_accumulated, self.max_reused_in_a_row, self.max_reused)
        limited = torch.zeros_like(total, dtype=torch.bool)
        for value, limit in zip((total, in_a_row, reused), limits, strict=True):
            limited = limited if limit is None else limited | (value >= limit)
        return limited
