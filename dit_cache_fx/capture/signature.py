"""The input signature of a call: calls with the same one run the same captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from dit_cache_fx.capture.callable import called_as, takes_anything
from dit_cache_fx.values.pytree import Skeleton, flatten, key_paths, unflatten
from dit_cache_fx.values.wrapped import PLAIN_TENSORS, Layout


class FlatCall(NamedTuple):
    """One call of the model, as tensors and a skeleton of everything else."""

    tensors: list[torch.Tensor]
    skeleton: Skeleton
    number: Any = None  # the timestep as passed, if it was a number or an array

    @property
    def key(self) -> Hashable:
        """Tree structure, non-tensor values, and each tensor's shape, dtype, device and layout."""
        known = [
            (t.shape, t.dtype, t.device, None if type(t) in PLAIN_TENSORS else Layout.of(t))
            for t in self.tensors
        ]
        return self.skeleton, tuple(known)

    def names(self) -> list[str]:
        """A Python identifier for each tensor: the argument's name, then the path inside it."""
        return ["_".join(str(key) for _, key in path) for path in key_paths(self.skeleton)]

    def arguments_of(self) -> list[str]:
        """The name of the argument that contains each tensor."""
        return [str(path[0][1]) for path in key_paths(self.skeleton)]


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


_VARIABLE = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}

#: an entry of the arguments besides names: the number of positional arguments
_BY_POSITION = "*"


class CallSignature:
    """Binds calls of one forward function to its parameter names.

    `hint`: names for positional arguments, if the function itself has no names for them.
    """

    def __init__(self, forward: Callable[..., Any], hint: Sequence[str] = ()) -> None:
        self._signature = called_as(forward)
        kinds = {name: p.kind for name, p in self._signature.parameters.items()}
        self.parameters = tuple(kinds)
        #: whether a call may have arguments that are no parameters
        self.open = bool(_VARIABLE.intersection(kinds.values()))
        self._hint = tuple(hint)
        self._var_keyword = _first(kinds, inspect.Parameter.VAR_KEYWORD)
        self._var_positional = _first(kinds, inspect.Parameter.VAR_POSITIONAL)
        self._keeps_places = takes_anything(forward)
        self._named = all(kind in _BY_NAME for kind in kinds.values())
        self._by_place = [n for n, kind in kinds.items() if kind is _BY_NAME[0]]
        self._defaults = {n: p.default for n, p in self._signature.parameters.items()}
        self._required = {n for n, d in self._defaults.items() if d is inspect.Parameter.empty}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, with defaults; `*args` and `**kwargs` have names too.

        A function with `*args` gets positional arguments by position.
        """
        if self._named and not (args and self._keeps_places):
            given = dict(zip(self._by_place, args, strict=False), **kwargs)
            whole = len(given) == len(args) + len(kwargs)  # no extra and no repeated arguments
            if whole and self._required <= given.keys() <= self._defaults.keys():
                return {**self._defaults, **given}
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if self._var_keyword is not None:
            arguments.update(arguments.pop(self._var_keyword))
        if self._keeps_places and args:
            arguments = self._in_places(args, arguments) | {_BY_POSITION: len(args)}
        elif self._var_positional is not None:
            del arguments[self._var_positional]
        return arguments

    def _in_places(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the positional arguments by name, in order, then the others."""
        if self._var_positional is None:
            return arguments
        rest = arguments.pop(self._var_positional)
        named = list(arguments)[: len(args) - len(rest)]
        names = [n for n in self._hint[len(named) :] if n not in arguments][: len(rest)]
        left, name = range(len(names), len(rest)), self._var_positional
        names += [name] if len(left) == 1 else [f"{name}_{i}" for i in left]
        ahead = {name: arguments.pop(name) for name in named}
        return ahead | dict(zip(names, rest, strict=True)) | arguments

    def call(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call `forward` with arguments that `bind` returned."""
        keyword = dict(arguments)
        count = keyword.pop(_BY_POSITION, 0)
        by_place = [*keyword][:count]
        for name, parameter in self._signature.parameters.items():
            only = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            if only and name in keyword and name not in by_place:
                by_place.append(name)
        positional = [keyword.pop(name) for name in by_place]
        return forward(*positional, **keyword)


def flatten_call(arguments: dict[str, Any], timestep_argument: str | None) -> FlatCall:
    """Flatten named arguments; a timestep passed as a number or an array becomes a tensor.

    Otherwise it would be a constant of the graph, and every step would have its own signature. An
    int becomes int64 and a float float64: a tensor of no dimensions does not take part in type
    promotion, so it acts like the number. numpy values keep their dtype.
    """
    value = None if timestep_argument is None else arguments.get(timestep_argument)
    number = value if _is_number(value) else None
    if timestep_argument is not None and number is not None:
        tensors, _ = flatten(arguments)
        device = tensors[0].device if tensors else None
        arguments = {**arguments, timestep_argument: _as_tensor(number, device)}
    tensors, skeleton = flatten(arguments)
    return FlatCall(tensors, skeleton, number)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number of Python or numpy, or an array of numbers."""
    if isinstance(value, (bool, torch.Tensor)):
        return False
    if isinstance(value, (int, float)):  # first: Dynamo's numbers cannot be asked for a dtype
        return True
    return getattr(getattr(value, "dtype", None), "kind", "") in ("i", "u", "f")


def _as_tensor(number: Any, device: torch.device | None) -> torch.Tensor:
    if not isinstance(number, (int, float)):
        return torch.as_tensor(number).to(device, copy=True)
    dtype = torch.int64 if isinstance(number, int) else torch.float64
    return torch.tensor(number, dtype=dtype, device=device)


def unflatten_call(skeleton: Skeleton, tensors: list[Any]) -> dict[str, Any]:
    """Return the named arguments of a flattened call."""
    arguments: dict[str, Any] = unflatten(skeleton, tensors)
    return arguments


def _first(kinds: dict[str, Any], kind: Any) -> str | None:
    return next((name for name, k in kinds.items() if k is kind), None)
