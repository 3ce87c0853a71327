"""Checks of options: each raises `OptionError` with the value and what would be right."""

from __future__ import annotations

import math
import operator
from typing import Any

from dit_cache_fx.errors import OptionError


def is_number(value: Any) -> bool:
    """Return whether the value is an integer or a float, but no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Return whether the value is an integer from `least` on, but no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(
    name: str, value: Any, least: int, optional: bool = False, meaning: str = ""
) -> None:
    """Raise `OptionError` if the value is no integer from `least` on. `meaning`: of the number."""
    if optional and value is None:
        return
    if not is_count(value, least):
        expected = f"{meaning}: an integer" if meaning else "an integer"
        raise OptionError(name, value, f"{expected} from {least}" + optional * ", or None")


def check_positive(name: str, value: Any, example: float, optional: bool = False) -> None:
    """Raise `OptionError` if the value is no finite number above 0."""
    if optional and value is None:
        return
    if not is_number(value) or not 0 < value < math.inf:
        raise OptionError(name, value, f"a number above 0, for example {example:g}")


def check_range(name: str, value: Any, least: float, most: float, expected: str) -> None:
    """Raise `OptionError` with the text `expected` if the value is no number in a range."""
    if not is_number(value) or not least <= value <= most:
        raise OptionError(name, value, expected)


def check_ratio(name: str, value: Any) -> None:
    """Raise `OptionError` if the value is no share of the steps."""
    if not is_number(value) or not 0 < value <= 1:
        raise OptionError(name, value, "a share of the steps above 0 and at most 1, such as 0.5")


def check_num_steps(value: Any, source: str = "num_steps") -> None:
    """Raise `OptionError` if the value is no number of steps."""
    check_count(source, value, 1, meaning="the number of steps of a generation")


def check_computed_steps(value: Any, num_steps: int | None = None) -> None:
    """Raise `OptionError` if no generation, or none of `num_steps`, has so many steps."""
    meaning = "the number of steps of a generation to compute in full"
    check_count("computed_steps", value, 1, meaning=meaning)
    if num_steps is not None and value > num_steps:
        most = f"{meaning}: an integer from 1 to {num_steps}, the number of its steps"
        raise OptionError("computed_steps", value, most)


def checked_steps(steps: Any) -> frozenset[int] | None:
    """Return the steps of `no_cache_steps`."""
    if steps is None:
        return None
    expected = "a collection of step indices: integers from 0"
    try:
        items = [_index(s) for s in steps]
    except TypeError:
        raise OptionError("no_cache_steps", steps, expected) from None
    if any(s < 0 for s in items):
        raise OptionError("no_cache_steps", sorted(items), expected)
    return frozenset(items)


def checked_block_ids(ids: Any) -> dict[str, frozenset[int]] | None:
    """Return the blocks of `no_cache_block_id`: block list -> ids."""
    if ids is None:
        return None
    expected = (
        "a mapping from the name of a block list to a collection of block indices (integers from 0)"
    )
    try:
        items = {str(k): frozenset(_index(i) for i in v) for k, v in dict(ids).items()}
    except (TypeError, ValueError):
        raise OptionError("no_cache_block_id", ids, expected) from None
    if any(i < 0 for v in items.values() for i in v):
        raise OptionError("no_cache_block_id", ids, expected)
    return items


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    return operator.index(value)
