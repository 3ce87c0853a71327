"""TeaCache: hold the residual of a cached run, and add it to this step's stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.checks import is_number
from dit_cache_fx.strategies.residual import ResidualCache
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.teacache_coefficients import TEACACHE_COEFFICIENTS, Coefficients

SIGNALS = ("modulated", "input", "conditioning", "embedding")


@dataclass(frozen=True, kw_only=True)
class TeaCache(ResidualCache):
    """TeaCache: a reused step adds the residual of the newest computed step to its own input.

    Liu et al.: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Models,
    arXiv:2411.19108.

    The residual is the difference between the output and the input of a cached run; one tensor is
    held for each value. With `rel_l1_thresh` a rule chooses the steps: it maps the relative change
    of the `signal` from step to step, `mean|s - s_previous| / mean|s_previous|`, with the
    polynomial `coefficients`, and sums up the results. A step computes when the sum reaches the
    threshold, and the sum starts again from 0.

    Args:
        cache_name (`str`, defaults to `"img"`):
            The block argument that carries the residual. If the blocks have no such argument, it is
            determined from the graph.
        rel_l1_thresh (`float`, *optional*):
            The sum at which a step computes, above 0, without unit. Setting it turns the rule on.
        coefficients (`str | Coefficients | Sequence[float]`, *optional*):
            The polynomial: a name from `TEACACHE_COEFFICIENTS` such as "flux", a `Coefficients`
            object, or the numbers, highest power first. When None, the identity. Only used with
            `rel_l1_thresh`.
        signal (`str`, *optional*):
            The value whose change the rule measures: "modulated" (the output of the first block's
            first adaptive norm), "input" (the first block's input), "conditioning" (the first
            block's input that depends on the timestep) or "embedding" (the timestep's embedding
            before anything else is added to it). When None, the value to which the published
            coefficients were fitted, else "modulated".

    Raises:
        OptionError: An option has a value that cannot work, or neither a schedule nor
            `rel_l1_thresh` is given.

    Example:
        >>> cached = dit_cache_fx.apply(model, "teacache", rel_l1_thresh=0.4, coefficients="flux")
    """

    cache_name: str = "img"
    rel_l1_thresh: float | None = None
    coefficients: str | Coefficients | Sequence[float] | None = None
    signal: str | None = None

    name: ClassVar[str] = "teacache"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_threshold()
        published = _published(self.coefficients)
        if self.signal is None:
            object.__setattr__(self, "signal", published.signal if published else SIGNALS[0])
        self._check_coefficients(published.values if published else self.coefficients)
        if self.signal not in SIGNALS:
            raise OptionError("signal", self.signal, f"one of {list(SIGNALS)}")
        if not isinstance(self.cache_name, str):
            raise OptionError("cache_name", self.cache_name, "the name of a block argument")

    def stream_name(self) -> str:
        return self.cache_name

    def looks_at(self) -> str:
        assert self.signal is not None
        return self.signal

    @property
    def has_rule(self) -> bool:
        return self.rel_l1_thresh is not None

    @property
    def threshold(self) -> float | None:
        return self.rel_l1_thresh

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        """Return the sum at the newest step, before a computed step sets it to 0."""
        return state[2] if state else None

    def init_state(self, signal: Tensor) -> RuleState:
        zero = torch.zeros((), dtype=torch.float64, device=signal.device)
        return signal, zero, zero.clone()

    def should_compute(
        self, signal: Tensor, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        assert self.rel_l1_thresh is not None
        previous, accumulated, _ = state
        moved, size = self.means((signal - previous).abs(), previous.abs())
        change = moved / size
        accumulated = accumulated + self._polynomial(change.double())
        compute = forced | (accumulated >= self.rel_l1_thresh)
        return compute, (signal, torch.where(compute, 0.0, accumulated), accumulated)

    def _polynomial(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for coefficient in self._numbers:
            result = result * x + coefficient
        return result

    @property
    def _numbers(self) -> tuple[float, ...]:
        assert self.coefficients is None or isinstance(self.coefficients, tuple)
        return self.coefficients or (1.0, 0.0)

    def _check_threshold(self) -> None:
        value = self.rel_l1_thresh
        if value is None:
            return
        if not is_number(value) or not value > 0:
            raise OptionError("rel_l1_thresh", value, "a number above 0, for example 0.15")

    def _check_coefficients(self, value: Any) -> None:
        if value is None:
            return
        expected = "a sequence of finite numbers, highest power first"
        try:
            numbers = tuple(float(c) for c in value)
        except (TypeError, ValueError):
            raise OptionError("coefficients", value, expected) from None
        if not numbers or not all(math.isfinite(c) for c in numbers):
            raise OptionError("coefficients", value, expected)
        if self.rel_l1_thresh is None:
            raise OptionError("coefficients", value, "only used with rel_l1_thresh: pass both")
        object.__setattr__(self, "coefficients", numbers)

    def _rule_hint(self) -> str:
        return "; or pass rel_l1_thresh (the dynamic rule)"


def _published(value: Any) -> Coefficients | None:
    if isinstance(value, str):
        if value not in TEACACHE_COEFFICIENTS:
            raise OptionError(
                "coefficients", value, f"one of {sorted(TEACACHE_COEFFICIENTS)}, or the numbers"
            )
        return TEACACHE_COEFFICIENTS[value]
    return value if isinstance(value, Coefficients) else None
