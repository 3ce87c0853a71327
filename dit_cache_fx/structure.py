"""Nested call values as a flat list of tensors and a hashable skeleton.

The skeleton holds everything that is not a tensor: container types, keys and constants. Two calls
with equal skeletons (and tensors of equal shape, dtype and device) run the same captured graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class Leaf(NamedTuple):
    """The place of a tensor."""


class Constant(NamedTuple):
    """A value compared by equality. The type tells 1 from 1.0 and True."""

    kind: type
    value: Any


class Identity:
    """A value compared by identity (arrays, functions, objects); kept alive by the skeleton."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"Identity({type(self.value).__name__})"


class Container(NamedTuple):
    """A dict, list, tuple, named tuple or dataclass: its type, keys and children."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Any, ...]


Skeleton = Leaf | Constant | Identity | Container
_LEAF = Leaf()


def flatten(value: Any) -> tuple[list[torch.Tensor], Skeleton]:
    """Split `value` into its tensors (in order of appearance) and its skeleton."""
    tensors: list[torch.Tensor] = []
    return tensors, _flatten(value, tensors)


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Skeleton:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _LEAF
    if isinstance(value, _PLAIN):
        return Constant(type(value), value)
    items = _items(value)
    if items is None:
        return Identity(value)
    return Container(
        type(value), tuple(k for k, _ in items), tuple(_flatten(v, tensors) for _, v in items)
    )


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The children of a container with their keys; None for what is not one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return None


def unflatten(
    skeleton: Skeleton,
    leaves: Sequence[Any],
    constant: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Rebuild a value with `leaves` (tensors, or anything that stands for them) in its places.

    `constant` maps the values that are compared by identity.
    """
    return _unflatten(skeleton, iter(leaves), constant)


def _unflatten(skeleton: Skeleton, leaves: Iterator[Any], constant: Callable[[Any], Any]) -> Any:
    if isinstance(skeleton, Leaf):
        return next(leaves)
    if isinstance(skeleton, Constant):
        return skeleton.value
    if isinstance(skeleton, Identity):
        return constant(skeleton.value)
    children = [_unflatten(child, leaves, constant) for child in skeleton.children]
    return _build(skeleton.kind, skeleton.keys, children)


def _build(kind: Any, keys: tuple[Any, ...], children: list[Any]) -> Any:
    make: Any = kind
    if dataclasses.is_dataclass(kind):
        return make(**dict(zip(keys, children, strict=True)))
    if issubclass(kind, dict):
        return kind(zip(keys, children, strict=True))
    if hasattr(kind, "_fields"):
        return kind(*children)
    return kind(children)


def paths(skeleton: Skeleton) -> list[tuple[Callable[[Any], Any], ...]]:
    """For each leaf, the accessors that lead to it from the value (see `accessor`)."""
    return [tuple(accessor(kind, key) for kind, key in path) for path in key_paths(skeleton)]


def key_paths(skeleton: Skeleton) -> list[tuple[tuple[type, Any], ...]]:
    """For each leaf, the (container type, key) steps that lead to it."""
    if isinstance(skeleton, Leaf):
        return [()]
    if not isinstance(skeleton, Container):
        return []
    return [
        ((skeleton.kind, key), *rest)
        for key, child in zip(skeleton.keys, skeleton.children, strict=True)
        for rest in key_paths(child)
    ]


def accessor(kind: Any, key: Any) -> Callable[[Any], Any]:
    """How to reach the child `key` of a container of type `kind`."""
    if dataclasses.is_dataclass(kind):
        return lambda value: getattr(value, key)
    return lambda value: value[key]


def constants(skeleton: Skeleton) -> Iterator[Constant | Identity]:
    """Every value in the skeleton that is not a tensor."""
    if isinstance(skeleton, (Constant, Identity)):
        yield skeleton
    elif isinstance(skeleton, Container):
        for child in skeleton.children:
            yield from constants(child)
