"""`timesteps=`: check, convert and align the timesteps of a generation's calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from dit_cache_fx.errors import OptionError

#: the timesteps of a generation, or a function that returns them: sequence, tensor or array
Timesteps = Iterable[float] | Callable[[], Any]

_EXPECTED = (
    "the timesteps of a generation's calls, in order: a flat sequence (or tensor, or array) of "
    "finite numbers, or a function that returns one, such as lambda: pipe.scheduler.timesteps"
)
#: models take a scheduler's timestep as it is, as a share of 1000, or counted from the end
UNITS = ((1.0, 0.0), (1000.0, 0.0), (-1.0, 1.0), (-1000.0, 1000.0))
#: the largest rounding error, as a share of the largest timestep: that of bfloat16
ROUNDED = 2.0**-8


def checked_timesteps(value: Any, name: str = "timesteps") -> tuple[float, ...]:
    """Return the numbers. Raises `OptionError` for other values, or more than one dimension."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    unordered = (str, bytes, Mapping, Set)
    if isinstance(listed, unordered) or not isinstance(listed, Iterable):
        raise OptionError(name, value, _EXPECTED)
    numbers = [_number(item) for item in listed]
    if not numbers or None in numbers:
        raise OptionError(name, value, _EXPECTED)
    return tuple(n for n in numbers if n is not None)


def given_timesteps(value: Timesteps | None) -> Timesteps | None:
    """Check a value from the user: numbers, or a function to call later."""
    return value if value is None or callable(value) else checked_timesteps(value)


def told_timesteps(function: Callable[[], Any]) -> tuple[float, ...] | None:
    """Call a function; None if it does not know the timesteps yet (None, or an empty result)."""
    value = function()
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        return None
    return checked_timesteps(value, "timesteps()")


def from_call(timesteps: Sequence[float], value: float) -> tuple[float, ...]:
    """Return the timesteps from that of a generation's first call on (img2img skips some).

    All of them if none fits the call's, in any unit that models take.
    """
    return tuple(timesteps[place_of(timesteps, value) or 0 :])


def place_of(timesteps: Sequence[float], value: float) -> int | None:
    """Return the index of a call's timestep; None if none fits it, in any unit."""
    places = [_placed(timesteps, value, unit) for unit in UNITS]
    return min((place for place in places if place is not None), default=None)


def told_of(timesteps: Sequence[float], values: Sequence[float]) -> float | None:
    """Return which of the values that a call's tokens have is the sampler's; None if none is.

    It is the one that comes first in the timesteps: the others belong to tokens that are given,
    such as the first frame of a video.
    """
    for units in (UNITS[:2], UNITS[2:]):  # counted from the end, a given token's 0 is the first
        pairs = [(_placed(timesteps, v, unit), v) for v in values for unit in units]
        known = [(place, value) for place, value in pairs if place is not None]
        if known:
            return min(known)[1]
    return None


def contradicted(timesteps: Sequence[float], first: float, second: float) -> bool:
    """Return whether the timesteps of a generation's first two calls contradict these.

    Nothing contradicts them if the first call's timestep is in an unknown unit.
    """
    units = [unit for unit in UNITS if _like(timesteps, 0, first, unit)]
    return bool(units) and not any(_like(timesteps, 1, second, unit) for unit in units)


def _like(timesteps: Sequence[float], index: int, value: float, unit: tuple[float, float]) -> bool:
    scale, shift = unit
    return abs(timesteps[index] - scale * value - shift) <= ROUNDED * max(map(abs, timesteps))


def _placed(timesteps: Sequence[float], value: float, unit: tuple[float, float]) -> int | None:
    """Return the index of a value in this unit.

    Counted from the end, a first call's 1 would be the last of those that end in 0: no call at all.
    """
    scale, shift = unit
    place = _nearest(timesteps, scale * value + shift)
    is_end = scale < 0 and place == len(timesteps) - 1 > 0
    return None if is_end else place


def _nearest(timesteps: Sequence[float], value: float) -> int | None:
    index = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - value))
    allowed = ROUNDED * max(map(abs, timesteps))
    return index if abs(timesteps[index] - value) <= allowed else None


def _number(item: Any) -> float | None:
    """Return the item as a number; None if it is no finite one."""
    item = item.item() if getattr(item, "shape", None) == () else item
    if isinstance(item, (bool, str, bytes)):
        return None
    try:
        number = float(item)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
