"""Support the former names of parts of a strategy, for strategies that users have written."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from dit_cache_fx.errors import warn

_NEW = {
    "begin": "init_state",
    "decide": "should_compute",
    "measured": "metric",
    "reads_start": "reads_run_input",
}


def name_both_ways(cls: type) -> None:
    """Give each renamed attribute of a class its old name too, and old attributes their new one.

    So `super()` has both. Warns about a class that uses old names.
    """
    own = vars(cls)
    renamed = {old: new for old, new in _NEW.items() if old in own and new not in own}
    for old, new in _NEW.items():
        if new in own:
            setattr(cls, old, own[new])
    for old, new in renamed.items():
        setattr(cls, new, _without_measured(own[old]) if new == "metric" else own[old])
    if renamed:
        names = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
        warn(f"{cls.__name__} has old names, which will be removed: {names}")


def _without_measured(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `measured(state)` in the signature of `metric`."""

    @wraps(method)
    def metric(self: Any, state: Any, measured: Any = None) -> Any:
        return method(self, state)

    return metric
