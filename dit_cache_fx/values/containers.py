"""Take containers and plain objects apart into children by key, and build them again."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import nn

_BUILT_IN = (dict, list, tuple, OrderedDict)
_MAPPINGS = (dict, types.MappingProxyType)
#: compared by equality, and never taken apart
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class Attribute(NamedTuple):
    """The key of a container's attribute, as opposed to an item."""

    name: str

    def __str__(self) -> str:
        return self.name


def children_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a container with their keys; None if `value` is no container."""
    if type(value) is dict:  # fast path: the arguments of every call
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if isinstance(value, _MAPPINGS):
        return [*value.items(), *_beside(value)]
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        return [*zip(names, value, strict=True), *_beside(value)]
    return attributes(value) if holds_tensors(value) or _is_record(value) else None


def _beside(container: Any) -> list[tuple[Any, Any]]:
    """Return the attributes that a container of the user's own type has besides its items."""
    if type(container) in _BUILT_IN or hasattr(container, "_fields"):
        return []
    found = attributes(container)
    if isinstance(container, defaultdict):
        found.append(("default_factory", container.default_factory))
    return [(Attribute(name), value) for name, value in found]


def attributes(value: object) -> list[tuple[str, Any]]:
    """Return the attributes of an object, from its dictionary and its slots."""
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found.pop("__dict__", None)
    found.pop("__weakref__", None)
    return [*found.items(), *getattr(value, "__dict__", {}).items()]


#: never taken apart: such values hold tensors of their own, or are compared by identity
_WHOLE = (nn.Module, Enum, type, types.FunctionType, types.ModuleType, types.MethodType)


def _is_record(value: Any, within: tuple[object, ...] = ()) -> bool:
    """Return whether an object consists of named plain values only, at every depth."""
    if isinstance(value, _WHOLE) or any(value is v for v in within):
        return False
    own = attributes(value)
    return bool(own) and all(_is_plain(child, (*within, value)) for _, child in own)


def _is_plain(value: Any, within: tuple[object, ...]) -> bool:
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, (dict, list, tuple)):
        children = value.values() if isinstance(value, dict) else value
        return all(_is_plain(child, within) for child in children)
    return _is_record(value, within)


def holds_tensors(value: Any, within: tuple[object, ...] = ()) -> bool:
    """Return whether containers and attributes lead to a tensor (`within`: the path so far)."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (*PLAIN, *_WHOLE)) or any(value is v for v in within):
        return False
    if isinstance(value, _MAPPINGS):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        children = [child for _, child in attributes(value)]
    return any(holds_tensors(child, (*within, value)) for child in children)


def build(kind: Any, keys: tuple[Any, ...], children: list[Any]) -> Any:
    """Build a container of this type."""
    if is_constructible(kind):
        return kind(**dict(zip(keys, children, strict=True)))
    items = [i for i in zip(keys, children, strict=True) if not isinstance(i[0], Attribute)]
    if kind in _BUILT_IN:
        return kind(items) if issubclass(kind, dict) else kind(children)
    if kind is types.MappingProxyType:
        return kind(dict(items))
    value = _filled(kind, items)
    for key, child in list(zip(keys, children, strict=True))[len(items) :]:
        object.__setattr__(value, key.name, child)
    return value


def _filled(kind: Any, items: list[tuple[Any, Any]]) -> Any:
    """Build a container or object with these items; its own `__init__` does not run."""
    if issubclass(kind, tuple):
        return kind(child for _, child in items)
    value = _blank(kind)
    if issubclass(kind, OrderedDict):
        OrderedDict.update(value, items)
    elif issubclass(kind, dict):
        dict.update(value, items)
    elif issubclass(kind, list):
        list.extend(value, (child for _, child in items))
    else:
        for key, child in items:
            object.__setattr__(value, key, child)
    return value


def _blank(kind: Any) -> Any:
    """Return an object of this type whose `__init__` has not run."""
    try:
        return object.__new__(kind)
    except TypeError:  # types from C have their own `__new__`
        return kind.__new__(kind)


def is_constructible(kind: Any) -> bool:
    """Return whether all parts can be passed to the type by name: named tuple, most dataclasses."""
    fields = getattr(kind, "__dataclass_fields__", None)  # Dynamo traces no `fields()` of a type
    if fields is not None:
        return all(f.init for f in fields.values())
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


@dataclasses.dataclass(frozen=True)
class Maker:
    """Builds containers of one type with fixed keys; an object that a graph can hold."""

    kind: type
    keys: tuple[Any, ...]


def make_container(maker: Maker, *children: Any) -> Any:
    """Build a container in a graph node, for types that are no graph literals."""
    return build(maker.kind, maker.keys, list(children))


def accessor(kind: Any, key: Any) -> Callable[[Any], Any]:
    """Return a function that reads the child `key` of a container of type `kind`."""
    if isinstance(key, Attribute):
        return lambda value: getattr(value, key.name)
    by_item = issubclass(kind, (*_MAPPINGS, list, tuple)) and not hasattr(kind, "_fields")
    if by_item and not dataclasses.is_dataclass(kind):
        return lambda value: value[key]
    return lambda value: getattr(value, key)
