"""Compare and restore the attributes of modules, and the lists and dicts among them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_cache_fx.values.identity import version

#: parameters, hooks, training mode, how it is called: not state of the model's own code
TORCHS = frozenset({*vars(nn.Module()), "_call_impl", "_compiled_call_impl"})

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
#: the depth to which containers are searched, and the largest length
_DEPTH, _LONGEST = 3, 10_000


#: a number that is multiplied for a call and divided after it returns to within this
ROUNDING = 1e-12


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


class _Tensor(NamedTuple):
    """A tensor, with the number of its in-place changes."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True)
class Owner:
    """An object that holds values by name or index: a module, a dict, a list.

    `attribute`: the module's attribute that contains it; None for a module itself.
    """

    holder: Any
    module: nn.Module
    path: str  # of the module, from the model
    attribute: str | None
    values: dict[Any, Any]


@dataclass(frozen=True)
class Change:
    """A value that changed."""

    owner: Owner
    key: Any
    before: Any
    now: Any

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.owner.holder), self.key

    @property
    def attribute(self) -> str:
        """The module's attribute that changed, or contains the change."""
        return str(self.key) if self.owner.attribute is None else self.owner.attribute

    @property
    def in_place(self) -> bool:
        """Whether it is the same tensor with other values."""
        was, now = self.before, self.now
        return isinstance(was, _Tensor) and isinstance(now, _Tensor) and was.tensor is now.tensor

    def slim(self) -> Change:
        """Return the same change without the other values of its owner."""
        return replace(self, owner=replace(self.owner, values={}), before=MISSING)

    def __str__(self) -> str:
        inside = "" if self.owner.attribute is None else f"[{self.key!r}]"
        return f"attribute '{self.attribute}'{inside} of {shown(self.owner.path)}"


def shown(path: str) -> str:
    """Return a module's path in words."""
    return f"module '{path}'" if path else "the model"


#: owners by the id of their holder; an owner keeps it alive
Attributes = dict[int, Owner]


def attributes(modules: Iterable[tuple[str, nn.Module]]) -> Attributes:
    """Return the current attributes of these modules (path and module), not of their children."""
    found: Attributes = {}
    for path, module in modules:
        values = _values(module)
        found[id(module)] = Owner(module, module, path, None, values)
        for name, value in values.items():
            _look(value, Owner(value, module, path, name, {}), found, _DEPTH)
    return found


def _look(value: Any, owner: Owner, found: Attributes, depth: int) -> None:
    container = isinstance(value, (dict, list, deque, set))
    if depth == 0 or id(value) in found or not container or len(value) > _LONGEST:
        return
    owner = Owner(value, owner.module, owner.path, owner.attribute, _values(value))
    found[id(value)] = owner
    for child in owner.values.values():
        _look(child, owner, found, depth - 1)


def _values(holder: Any) -> dict[Any, Any]:
    return {key: _noted(value) for key, value in _items(holder)}


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(holder, nn.Module):
        yield from ((k, v) for k, v in list(vars(holder).items()) if k not in TORCHS)
        yield from holder._buffers.items()
    elif isinstance(holder, dict):
        yield from holder.items()
    elif isinstance(holder, set):
        yield from ((value, True) for value in holder)
    else:
        yield from enumerate(holder)


def _noted(value: Any) -> Any:
    return _Tensor(value, version(value)) if isinstance(value, torch.Tensor) else value


def noted(value: Any) -> Any:
    """Return the value behind an entry of `attributes`."""
    return value.tensor if isinstance(value, _Tensor) else value


def changes(before: Attributes, now: Attributes) -> list[Change]:
    """Return the differences, among the keys that both have."""
    return [
        Change(owner, key, was, value)
        for place, owner in now.items()
        if place in before
        for key in {**before[place].values, **owner.values}
        for was in [before[place].values.get(key, MISSING)]
        for value in [owner.values.get(key, MISSING)]
        if not same(was, value)
    ]


def same(a: Any, b: Any) -> bool:
    """Return whether two entries are the same object, or plain and equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _Tensor):
        return a.tensor is b.tensor and a.version == b.version
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float) and math.isclose(a, b, rel_tol=ROUNDING):
        return True
    return isinstance(a, (*_PLAIN, set, frozenset)) and bool(a == b or (a != a and b != b))


def is_plain(value: Any) -> bool:
    """Return whether a value is compared by equality: number, text, or a container of such."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return isinstance(value, (*_PLAIN, _Missing))


def get(holder: Any, key: Any) -> Any:
    """Return the current entry of a holder."""
    if isinstance(holder, nn.Module):
        return _noted({**holder._buffers, **vars(holder)}.get(key, MISSING))
    if isinstance(holder, dict):
        return _noted(holder.get(key, MISSING))
    return _values(holder).get(key, MISSING)


def put(holder: Any, key: Any, value: Any) -> None:
    """Set an entry of a holder; `MISSING` removes it."""
    into: Any = holder
    if isinstance(holder, nn.Module):
        into = holder._buffers if key in holder._buffers else vars(holder)
    if value is MISSING:
        into.pop(key, None)
    else:
        into[key] = noted(value)


def restore(modules: Iterable[tuple[str, nn.Module]], then: Attributes) -> None:
    """Restore the attributes of these modules; in-place changes of tensors remain."""
    for change in changes(then, attributes(modules)):
        if change.in_place:
            continue
        holder = change.owner.holder
        if isinstance(holder, (nn.Module, dict)):
            put(holder, change.key, change.before)
        else:
            _refill(holder, then[id(holder)].values)


def _refill(holder: Any, values: dict[Any, Any]) -> None:
    holder.clear()
    if isinstance(holder, set):
        holder.update(values)
    else:
        holder.extend(map(noted, values.values()))
