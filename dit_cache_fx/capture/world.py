"""Detect changes of Python state that blocks may read besides their arguments.

Such state (variables of modules, contexts) cannot all be found, and it is unknown which of it a
block reads. Changes between the model's call and the call of a block can be found: then the blocks
are suspect, and a check runs them.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from operator import is_
from threading import Thread, local
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn

from dit_cache_fx.capture.attributes import TORCHS, is_plain
from dit_cache_fx.values.containers import attributes

#: the depth of the search from a variable or an attribute, and the largest number of holders
_DEPTH, _MOST = 4, 50_000
#: the number of imports to follow from the model's own code
_IMPORTS = 2

#: packages whose state does not belong to the model
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "dit_cache_fx"})
_CONTAINERS = (dict, list, tuple, set, deque)
#: the state of a thread (a progress bar's monitor, for example) changes while it runs
_LEAVES = (torch.Tensor, types.ModuleType, types.MethodType, Thread, str, bytes, int, float)


_LOOKED_INTO = (*_CONTAINERS, nn.Module, ContextVar, local, ref, types.SimpleNamespace)


class _Holder(NamedTuple):
    """An object that holds values.

    `values`: returns its values as they are now. `held`: those at first; `names`: the same by name,
    to restore them.
    """

    value: Any
    values: Callable[[], Iterable[Any]]
    held: list[Any]
    names: dict[Any, Any] | None

    @staticmethod
    def of(value: Any) -> _Holder:
        names, values = _names_of(value), _values_of(value)
        return _Holder(value, values, list(values()), None if names is None else dict(names))

    def has_changed(self) -> bool:
        return not _same(self.held, list(self.values()))


class World:
    """The state that the code of a model's classes can reach, at one time.

    `theirs`: blocks and layers with everything inside. Their attributes are not part of it; objects
    that these refer to are.
    """

    def __init__(self, model: nn.Module, theirs: Collection[nn.Module]) -> None:
        self._holders: list[_Holder] = []
        self._seen: set[int] = set(map(id, theirs))
        namespaces = _namespaces({type(m).__module__ for m in model.modules()})
        self._names = frozenset(namespaces)
        for name in namespaces:
            self._look(vars(sys.modules[name]), _DEPTH)
        for module in theirs:
            for value in _inside(module):
                self._look(value, _DEPTH)
        self._known = self._now()

    def changed(self) -> bool:
        """Return whether any of it has changed since the last `refresh`."""
        return not _same(self._known, self._now())

    def refresh(self) -> None:
        """Take it again as it is now."""
        self._known = self._now()

    def _now(self) -> list[Any]:
        """Return all values in one list: comparing it costs a fraction of one list for each."""
        return [*chain.from_iterable(holder.values() for holder in self._holders)]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Restore variables and attributes to this state for the duration of the context."""
        changed = [h for h in self._holders if h.has_changed()]
        kept = [
            (names, was)
            for h in changed
            if (names := _names_of(h.value)) is not None
            if (was := h.names) is not None
        ]
        now = [(names, dict(names)) for names, _ in kept]
        for names, was in kept:
            _fill(names, was)
        try:
            yield
        finally:
            for names, was in now:
                _fill(names, was)

    def _look(self, value: Any, depth: int) -> None:
        known = id(value) in self._seen or len(self._holders) >= _MOST
        if depth == 0 or known or not self._holds(value):
            return
        self._seen.add(id(value))
        holder = _Holder.of(value)
        self._holders.append(holder)
        for child in _inside(value):
            self._look(child, depth - 1)

    def _holds(self, value: Any) -> bool:
        """Return whether the search looks into a value."""
        if value is None or isinstance(value, _LEAVES):
            return False
        if isinstance(value, type):
            return value.__module__ in self._names
        if isinstance(value, types.FunctionType):
            return bool(value.__closure__)
        if isinstance(value, _LOOKED_INTO):
            return True
        return type(value).__module__.partition(".")[0] not in _FOREIGN


def _namespaces(names: Iterable[str]) -> list[str]:
    """Return these Python modules, and those that they import from."""
    found = dict.fromkeys(n for n in names if _is_own(n))
    for _ in range(_IMPORTS):
        for name in list(found):
            found |= dict.fromkeys(n for n in _imported(vars(sys.modules[name])) if _is_own(n))
    return list(found)


def _imported(namespace: dict[str, Any]) -> Iterator[str]:
    for value in list(namespace.values()):
        if isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, (type, types.FunctionType)):
            yield value.__module__


def _is_own(name: str | None) -> bool:
    known = name is not None and name in sys.modules
    return known and str(name).partition(".")[0] not in _FOREIGN


def _names_of(value: Any) -> dict[Any, Any] | None:
    """Return the settable values of an object by name, if it has any."""
    if isinstance(value, (nn.Module, type, types.FunctionType)):
        return None
    return value if isinstance(value, dict) else getattr(value, "__dict__", None)


def _fill(names: dict[Any, Any], values: dict[Any, Any]) -> None:
    for key in [key for key in names if key not in values]:
        del names[key]
    names.update(values)


def _inside(value: Any) -> list[Any]:
    """Return the values in an object that the search looks into."""
    if isinstance(value, nn.Module):
        return [v for k, v in list(vars(value).items()) if k not in TORCHS]
    if isinstance(value, type):
        return [v for k, v in list(vars(value).items()) if not k.startswith("__")]
    return list(_values_of(value)())


def _values_of(value: Any) -> Callable[[], Iterable[Any]]:
    """Return a function that returns the values that an object holds, in order."""
    if isinstance(value, dict) and not _BOOKKEEPING.isdisjoint(value):
        return lambda: [v for k, v in list(value.items()) if k not in _BOOKKEEPING]
    if isinstance(value, dict):
        return partial(dict.values, value)
    if isinstance(value, _CONTAINERS):
        return lambda: value
    if isinstance(value, ContextVar):
        return lambda: [value.get(None)]
    if isinstance(value, ref):
        return lambda: [value()]
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        return lambda: [cell.cell_contents for cell in cells if _is_filled(cell)]
    if isinstance(value, (nn.Module, type)):
        return lambda: vars(value).values()
    return lambda: [v for _, v in attributes(value)]


#: names in a module's namespace that Python itself maintains
_BOOKKEEPING = frozenset({"__warningregistry__", "__builtins__"})


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) == len(b) and all(map(is_, a, b)):
        return True
    return len(a) == len(b) and all(
        x is y or (is_plain(x) and x == y) for x, y in zip(a, b, strict=True)
    )
