"""The input signature: what two calls must share to run the same captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from dit_cache_fx.values.pytree import Skeleton, flatten, key_paths, unflatten


@dataclass(frozen=True)
class FlatCall:
    """One call of the model, as tensors and a skeleton of everything else."""

    tensors: list[torch.Tensor]
    skeleton: Skeleton
    number: int | float | None = None  # the timestep, where it was given as a number

    @property
    def key(self) -> Hashable:
        """Tree structure, non-tensor values, and each tensor's shape, dtype and device."""
        return self.skeleton, tuple((t.shape, t.dtype, t.device) for t in self.tensors)

    def names(self) -> list[str]:
        """A Python identifier for each tensor: the argument's name, then the path inside it."""
        return ["_".join(str(key) for _, key in path) for path in key_paths(self.skeleton)]

    def arguments_of(self) -> list[str]:
        """For each tensor, the name of the argument that it arrived in."""
        return [str(path[0][1]) for path in key_paths(self.skeleton)]


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class CallSignature:
    """Binds calls of one forward function to its parameter names."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._signature = inspect.signature(forward)
        kinds = {name: p.kind for name, p in self._signature.parameters.items()}
        self.parameters = tuple(kinds)
        self.open = inspect.Parameter.VAR_KEYWORD in kinds.values()
        self._var_keyword = _first(kinds, inspect.Parameter.VAR_KEYWORD)
        self._var_positional = _first(kinds, inspect.Parameter.VAR_POSITIONAL)
        self._named = all(kind in _BY_NAME for kind in kinds.values())
        self._defaults = {n: p.default for n, p in self._signature.parameters.items()}
        self._required = {n for n, d in self._defaults.items() if d is inspect.Parameter.empty}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults included, `**kwargs` flattened into the names."""
        if not args and self._named and self._required <= kwargs.keys() <= self._defaults.keys():
            return {name: kwargs.get(name, default) for name, default in self._defaults.items()}
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if self._var_keyword is not None:
            arguments.update(arguments.pop(self._var_keyword))
        return arguments

    def call(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call `forward` with arguments that `bind` returned."""
        positional: list[Any] = []
        keyword = dict(arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(keyword.pop(name))
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                break
            elif self._positional(parameter):
                positional.append(keyword.pop(name))
        return forward(*positional, **keyword)

    def _positional(self, parameter: inspect.Parameter) -> bool:
        """Whether it must go by position: it cannot go by name, or `*args` follows it."""
        only = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        ahead = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        return only or (ahead and self._var_positional is not None)


def flatten_call(arguments: dict[str, Any], timestep: str | None) -> FlatCall:
    """Flatten named arguments; a timestep given as a number becomes a tensor of no dimensions.

    A number would be a constant of the graph and every step another signature. An int becomes
    int64 and a float float64: a tensor of no dimensions does not take part in type promotion,
    so it acts as the number does.
    """
    value = arguments.get(timestep) if timestep is not None else None
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if timestep is not None and number is not None:
        dtype = torch.int64 if isinstance(number, int) else torch.float64
        tensors, _ = flatten(arguments)
        device = tensors[0].device if tensors else None
        arguments = {**arguments, timestep: torch.tensor(number, dtype=dtype, device=device)}
    tensors, skeleton = flatten(arguments)
    return FlatCall(tensors, skeleton, number)


def unflatten_call(skeleton: Skeleton, tensors: list[Any]) -> dict[str, Any]:
    """The named arguments of a flattened call."""
    arguments: dict[str, Any] = unflatten(skeleton, tensors)
    return arguments


def _first(kinds: dict[str, Any], kind: Any) -> str | None:
    return next((name for name, k in kinds.items() if k is kind), None)
