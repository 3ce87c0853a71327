"""Sets of steps that are computed in full."""

from __future__ import annotations

from dit_cache_fx.errors import OptionError


def interval_schedule(num_steps: int, start: int, end: int, interval: int) -> set[int]:
    """`range(0, start)`, `range(start, end, interval)` and `range(end, num_steps)`.

    HunyuanVideo-1.5's is `interval_schedule(50, 11, 45, 4)`: 25 of 50 steps.
    """
    for name, value in (("num_steps", num_steps), ("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(name, value, "an integer from 0")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise OptionError("interval", interval, "an integer from 1")
    if not start <= end <= num_steps:
        raise OptionError("start", start, f"start <= end={end} <= num_steps={num_steps} must hold")
    return {*range(start), *range(start, end, interval), *range(end, num_steps)}
