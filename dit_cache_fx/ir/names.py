"""Names of the operands that a lowered graph has beside the call's own tensors.

Graphs are given their operands by name. No node of a program may be called as one of these is,
whatever the model's arguments and operators are called: `unreserved` sees to that.
"""

from __future__ import annotations

#: what both sides of a run read of the step (`strategies.Clock`)
CLOCK_NAMES = ("distance", "computed", "gap", "reach", "way")

#: the clock, the flags of a decision, and what a state holds beside the tensors
_WORDS = frozenset({*CLOCK_NAMES, "forced", "fresh", "clock", "checksum", "lost"})
_CACHED, _MEASURED, _STATE = "cached_", "measured_", "state_"


def cached_name(value: str, slot: int) -> str:
    """The tensor cached in a slot for a value of a cached run."""
    return f"{_CACHED}{value}_{slot}"


def measured_name(value: str) -> str:
    """What is measured of a value of a cached run on a computed step."""
    return f"{_MEASURED}{value}"


def is_measured(name: str) -> bool:
    """Whether an operand is what was measured of a value."""
    return name.startswith(_MEASURED)


def state_name(index: int) -> str:
    """A tensor that the strategy's rule remembers."""
    return f"{_STATE}{index}"


def is_reserved(name: str) -> bool:
    """Whether a node of that name could be taken for an operand of a lowered graph."""
    return name in _WORDS or name.startswith((_CACHED, _MEASURED, _STATE))


def unreserved(name: str) -> str:
    """A name for a node of a program: another one where this one is reserved."""
    return f"model_{name}" if is_reserved(name) else name
