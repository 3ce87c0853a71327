"""The signals of a strategy's rule, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.clock import Clock

#: values of the model
VALUES = ("modulated", "input", "conditioning", "embedding", "residual", "sample")
#: the result of `Strategy.measure` on the newest computed step
MEASURED = "measured"


def value_of(strategy: Strategy) -> str | None:
    """Return the value of the model that the rule reads; None if there is none.

    Raises `OptionError` for an unknown name, or several values.
    """
    if not strategy.has_rule:
        return None
    names = _names(strategy)
    unknown = [name for name in names if name not in (*VALUES, *Clock._fields, MEASURED)]
    if unknown:
        known = [*VALUES, *Clock._fields, MEASURED]
        raise OptionError("looks_at()", strategy.looks_at(), f"of {known}; got {unknown}")
    values = [name for name in names if name in VALUES]
    if len(values) > 1:
        raise OptionError("looks_at()", strategy.looks_at(), f"at most one of {list(VALUES)}")
    return values[0] if values else None


def signal_of(
    strategy: Strategy, value: Tensor | None, clock: Clock, measured: Tensor | None
) -> Any:
    """Return the `signal` of the rule: one tensor, or one for each of several names."""
    given: dict[str, Any] = {**dict.fromkeys(VALUES, value), **clock._asdict(), MEASURED: measured}
    found = tuple(given[name] for name in _names(strategy))
    return found[0] if isinstance(strategy.looks_at(), str) else found


def in_one(measured: Sequence[Tensor]) -> Tensor | None:
    """Return the measurements of all held values in one tensor; None if nothing is measured."""
    if not measured:
        return None
    return torch.stack([m.to(measured[0].device, torch.float64) for m in measured])


def _names(strategy: Strategy) -> tuple[str, ...]:
    names = strategy.looks_at()
    return (names,) if isinstance(names, str) else names
