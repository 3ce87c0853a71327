"""The options of a strategy: their names, and those that differ from the defaults."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from dit_cache_fx.strategies.base import Strategy

#: the options that select the steps to compute
SCHEDULING = (
    "no_cache_steps",
    "compute_ratio",
    "schedule",
    "computed_steps",
    "num_steps",
    "timesteps",
)


def options_of(strategy: type[Strategy]) -> list[str]:
    """Return the names of a strategy's options."""
    return [f.name for f in fields(strategy)]


def predictor_options(strategy: Strategy) -> dict[str, Any]:
    """Return the options of the predictions with other values than the defaults."""
    given = {f.name: (getattr(strategy, f.name), f.default) for f in fields(strategy)}
    return {
        name: value
        for name, (value, default) in given.items()
        if name not in (*SCHEDULING, "process_group") and (default is MISSING or value != default)
    }
