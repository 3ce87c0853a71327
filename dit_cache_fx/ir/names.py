"""Reserved names: the operands that a lowered graph has besides the call's own tensors.

Graphs receive their operands by name. No node of a program may have such a name, whatever the names
of the model's arguments and operators: `unreserved` renames it.
"""

from __future__ import annotations

#: the tensors of the step that both sides of a run read (`strategies.Clock`)
CLOCK_NAMES = ("distance", "computed", "gap", "reach", "way")

#: the clock, the flags of a decision, and the other entries of a state besides tensors
_WORDS = frozenset({*CLOCK_NAMES, "forced", "fresh", "clock", "checksum", "lost"})
_CACHED, _MEASURED, _STATE = "cached_", "measured_", "state_"


def cached_name(value: str, slot: int) -> str:
    """Return the operand name of a cached tensor: a slot of a value of a cached run."""
    return f"{_CACHED}{value}_{slot}"


def measured_name(value: str) -> str:
    """Return the operand name of the measurement of a value on a computed step."""
    return f"{_MEASURED}{value}"


def is_measured(name: str) -> bool:
    """Return whether an operand is a measurement."""
    return name.startswith(_MEASURED)


def state_name(index: int) -> str:
    """Return the operand name of a tensor in the rule's state."""
    return f"{_STATE}{index}"


def is_reserved(name: str) -> bool:
    """Return whether the name could be mistaken for an operand of a lowered graph."""
    return name in _WORDS or name.startswith((_CACHED, _MEASURED, _STATE))


def unreserved(name: str) -> str:
    """Return a name for a node of a program: another one if this one is reserved."""
    return f"model_{name}" if is_reserved(name) else name
