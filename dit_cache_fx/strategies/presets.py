"""The presets of `schedule="..."`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.even import EvenNoise
from dit_cache_fx.strategies.schedule import Schedule

#: docs/quality.md has the measurements
PRESETS: Mapping[str, EvenNoise] = MappingProxyType(
    {"quality": EvenNoise(0.4), "balanced": EvenNoise(0.2), "fast": EvenNoise(0.1)}
)


def named_schedule(value: Any) -> Schedule:
    """Return the schedule of `schedule=value`: of a preset's name, or the object itself."""
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, Schedule):
        return value
    raise OptionError("schedule", value, f"one of {list(PRESETS)}, or a Schedule object")
