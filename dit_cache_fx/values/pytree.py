"""Flatten nested call values into a list of tensors and a hashable skeleton.

The skeleton holds everything that is not a tensor: container types, keys and constants. Two calls
with equal skeletons (and tensors of equal shape, dtype and device) run the same captured graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dit_cache_fx.values.containers import PLAIN, build, children_of


class Leaf(NamedTuple):
    """The position of a tensor."""


class Constant(NamedTuple):
    """A value compared by equality. The type separates 1, 1.0 and True."""

    kind: type
    value: Any


class Identity:
    """A value compared by identity (array, function, object); the skeleton keeps it alive.

    Functions without a closure are equal if their code is (a lambda that is created again).
    """

    def __init__(self, value: object) -> None:
        self.value = value
        self._same = value
        if isinstance(value, types.FunctionType) and not _closes_over(value):
            self._same = value.__code__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other._same is self._same

    def __hash__(self) -> int:
        return id(self._same)

    def __repr__(self) -> str:
        return f"Identity({type(self.value).__name__})"


def _closes_over(function: types.FunctionType) -> bool:
    own = (function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function))
    return any(own)


class Container(NamedTuple):
    """A dict, list, tuple, dataclass or plain object: its type, keys and children."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Any, ...]


Skeleton = Leaf | Constant | Identity | Container
_LEAF = Leaf()
_NONE, _TRUE, _FALSE = (Constant(type(value), value) for value in (None, True, False))
#: texts of values in messages are cut to this length
_LONGEST = 60


def flatten(value: Any) -> tuple[list[torch.Tensor], Skeleton]:
    """Split `value` into its tensors (in order of appearance) and its skeleton."""
    tensors: list[torch.Tensor] = []
    return tensors, _flatten(value, tensors)


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Skeleton:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _LEAF
    if value is None or value is True or value is False:  # most of a call's other arguments
        return _NONE if value is None else _TRUE if value else _FALSE
    if isinstance(value, PLAIN):
        return Constant(type(value), value)
    items = children_of(value)
    if items is None:
        return Identity(value)
    keys, values = zip(*items, strict=True) if items else ((), ())
    return Container(type(value), keys, tuple([_flatten(child, tensors) for child in values]))


def unflatten(
    skeleton: Skeleton,
    leaves: Sequence[Any],
    constant: Callable[[Any], Any] = lambda value: value,
    make: Callable[[type, tuple[Any, ...], list[Any]], Any] | None = None,
) -> Any:
    """Rebuild a value with `leaves` (tensors, or stand-ins for them) in their positions.

    `constant` maps the values that are compared by identity; `make(kind, keys, children)` builds
    the containers (default: `build`).
    """
    return _unflatten(skeleton, iter(leaves), constant, make or build)


def _unflatten(
    skeleton: Skeleton, leaves: Iterator[Any], constant: Callable[[Any], Any], make: Any
) -> Any:
    if isinstance(skeleton, Leaf):
        return next(leaves)
    if isinstance(skeleton, Constant):
        return skeleton.value
    if isinstance(skeleton, Identity):
        return constant(skeleton.value)
    children = [_unflatten(child, leaves, constant, make) for child in skeleton.children]
    return make(skeleton.kind, skeleton.keys, children)


def key_paths(skeleton: Skeleton) -> list[tuple[tuple[type, Any], ...]]:
    """Return the path of each leaf: steps of (container type, key)."""
    if isinstance(skeleton, Leaf):
        return [()]
    if not isinstance(skeleton, Container):
        return []
    return [
        ((skeleton.kind, key), *rest)
        for key, child in zip(skeleton.keys, skeleton.children, strict=True)
        for rest in key_paths(child)
    ]


def difference(now: Skeleton, before: Skeleton, path: str = "") -> str | None:
    """Describe the first changed value that is no tensor; None if all are the same."""
    if now == before:
        return None
    if isinstance(now, Container) and isinstance(before, Container) and now.keys == before.keys:
        for key, child, was in zip(now.keys, now.children, before.children, strict=True):
            found = difference(child, was, f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
    return f"{path or 'the call'} is {_in_words(now)}, was {_in_words(before)}"


def _in_words(skeleton: Skeleton) -> str:
    if isinstance(skeleton, Leaf):
        return "a tensor"
    if isinstance(skeleton, Container):
        return f"a {skeleton.kind.__name__} of {len(skeleton.keys)}"
    text = repr(skeleton.value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def constants(skeleton: Skeleton) -> Iterator[Any]:
    """Yield every value in the skeleton that is not a tensor, in order."""
    if isinstance(skeleton, (Constant, Identity)):
        yield skeleton.value
    elif isinstance(skeleton, Container):
        for child in skeleton.children:
            yield from constants(child)
