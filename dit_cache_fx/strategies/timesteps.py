"""`timesteps=`: what the timesteps of a generation's calls are, or what tells them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from dit_cache_fx.errors import OptionError

#: the timesteps of a generation, or what tells them; a sequence, a tensor or an array
Timesteps = Iterable[float] | Callable[[], Any]

_EXPECTED = (
    "the timesteps of a generation's calls, in order: a flat sequence (or tensor, or array) of "
    "finite numbers, or a function that gives one, such as lambda: pipe.scheduler.timesteps"
)
#: models are given a scheduler's timestep as it is, or as a share of 1000, or counted from the end
UNITS = ((1.0, 0.0), (1000.0, 0.0), (-1.0, 1.0), (-1000.0, 1000.0))
#: share of the largest timestep by which one may be off: what bfloat16 rounds
ROUNDED = 2.0**-8


def checked_timesteps(value: Any, name: str = "timesteps") -> tuple[float, ...]:
    """The numbers. Raises `OptionError` where they are none, or not in one row."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    unordered = (str, bytes, Mapping, Set)
    if isinstance(listed, unordered) or not isinstance(listed, Iterable):
        raise OptionError(name, value, _EXPECTED)
    numbers = [_number(item) for item in listed]
    if not numbers or None in numbers:
        raise OptionError(name, value, _EXPECTED)
    return tuple(n for n in numbers if n is not None)


def given_timesteps(value: Timesteps | None) -> Timesteps | None:
    """What a user sets: numbers that are checked, or a function that is asked later."""
    return value if value is None or callable(value) else checked_timesteps(value)


def told_timesteps(function: Callable[[], Any]) -> tuple[float, ...] | None:
    """What a function tells; None where it does not know yet (None, or nothing in it)."""
    value = function()
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        return None
    return checked_timesteps(value, "timesteps()")


def from_call(timesteps: Sequence[float], value: float) -> tuple[float, ...]:
    """Those from the one that a generation's first call has (img2img leaves out the first ones).

    All of them where none is like the call's, in no unit in which models take timesteps.
    """
    return tuple(timesteps[place_of(timesteps, value) or 0 :])


def place_of(timesteps: Sequence[float], value: float) -> int | None:
    """The index of the one that a call has; None where none is like it, in any unit."""
    places = [_placed(timesteps, value, unit) for unit in UNITS]
    return min((place for place in places if place is not None), default=None)


def told_of(timesteps: Sequence[float], values: Sequence[float]) -> float | None:
    """Which of the values that the tokens of one call have is the sampler's; None where none is.

    It is the one that comes first in the timesteps: the others are of tokens that are given, such
    as the first frame of a video.
    """
    for units in (UNITS[:2], UNITS[2:]):  # counted from the end, a given token's 0 is the first
        pairs = [(_placed(timesteps, v, unit), v) for v in values for unit in units]
        known = [(place, value) for place, value in pairs if place is not None]
        if known:
            return min(known)[1]
    return None


def contradicted(timesteps: Sequence[float], first: float, second: float) -> bool:
    """Whether a generation's first two calls have timesteps that cannot be the first two of these.

    Nothing contradicts them where the first call's is in no unit in which models take them.
    """
    units = [unit for unit in UNITS if _like(timesteps, 0, first, unit)]
    return bool(units) and not any(_like(timesteps, 1, second, unit) for unit in units)


def _like(timesteps: Sequence[float], index: int, value: float, unit: tuple[float, float]) -> bool:
    scale, shift = unit
    return abs(timesteps[index] - scale * value - shift) <= ROUNDED * max(map(abs, timesteps))


def _placed(timesteps: Sequence[float], value: float, unit: tuple[float, float]) -> int | None:
    """The index of a value in this unit.

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
    """The item as a number; None where it is no finite one."""
    item = item.item() if getattr(item, "shape", None) == () else item
    if isinstance(item, (bool, str, bytes)):
        return None
    try:
        number = float(item)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
