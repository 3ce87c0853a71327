"""Determine the parameters of a forward, even if it is wrapped.

`inspect.signature` follows `__wrapped__` and takes its signature for the wrapper's. That is wrong
by one argument if only one of the two is bound to the model.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, NamedTuple

from torch import nn

_ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class _Found(NamedTuple):
    signature: Signature
    bound: bool  # without the parameter for the model
    method: bool = False  # certainly with it: a function of a class


def called_as(forward: Callable[..., Any]) -> Signature:
    """Return the parameters of a forward as it is called, without the model.

    For a wrapper with `*args, **kwargs` these are the parameters of the wrapped function.
    """
    if isinstance(forward, functools.partial) and _wraps_its_own(forward):
        return _rest(forward)
    if isinstance(forward, types.MethodType):
        found = _found(forward.__func__)
        return found.signature if found.bound else _without(found.signature, 1)
    found = _found(forward)
    return _without(found.signature, 1) if found.method else found.signature


def takes_anything(forward: Callable[..., Any]) -> bool:
    """Return whether it takes any number of positional arguments."""
    parameters = _own(forward).parameters.values()
    return any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)


def positional_names(model: nn.Module) -> tuple[str, ...]:
    """Return the positional parameters of forward in the first class that names them.

    For a replaced forward that takes `*args` and does not name the function that it wraps.
    """
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        if isinstance(forward, types.FunctionType):
            signature = _without(_found(forward).signature, 1)
            if not any(p.kind in _ANY for p in signature.parameters.values()):
                return tuple(signature.parameters)
    return ()


def _wraps_its_own(forward: functools.partial[Any]) -> bool:
    """Return whether a partial object calls another function than it claims to wrap."""
    return getattr(forward, "__wrapped__", forward.func) is forward.func


def _own(function: Callable[..., Any]) -> Signature:
    return inspect.signature(function, follow_wrapped=False)


def _found(function: Callable[..., Any]) -> _Found:
    """Return the parameters of a function, and whether the model's is left out."""
    own, wrapped = _own(function), getattr(function, "__wrapped__", None)
    is_open = any(p.kind in _ANY for p in own.parameters.values())
    if wrapped is None or not is_open:
        return _Found(own, bound=False, method=_is_method(function))
    found = (
        _found(wrapped)
        if isinstance(wrapped, types.FunctionType)
        else _Found(called_as(wrapped), bound=True)
    )
    return found._replace(signature=_with_more(found.signature, own))


def _is_method(function: Callable[..., Any]) -> bool:
    """Return whether a function was defined in a class, and not inside a function."""
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    return isinstance(function, types.FunctionType) and owner[-1:] not in ("", ">")


def _rest(forward: functools.partial[Any]) -> Signature:
    """Return the remaining parameters of a partial call."""
    inner: Any = forward.func
    if isinstance(inner, types.FunctionType):
        found = _found(inner)
        given = len(forward.args) - found.bound  # the model fills the wrapper's own parameter
        signature = _without(found.signature, given)
    else:
        signature = _without(called_as(inner), len(forward.args))
    left = [p for name, p in signature.parameters.items() if name not in forward.keywords]
    return signature.replace(parameters=left)


def _without(signature: Signature, count: int) -> Signature:
    """Drop the first positional parameters; `*args` counts as any number of them."""
    parameters = list(signature.parameters.values())
    while count > 0 and parameters and parameters[0].kind not in _ANY:
        parameters.pop(0)
        count -= 1
    return signature.replace(parameters=parameters)


def _with_more(signature: Signature, own: Signature) -> Signature:
    """Add the keywords of a wrapper to those of the wrapped function."""
    known = signature.parameters
    more = [
        p
        for name, p in own.parameters.items()
        if p.kind is Parameter.KEYWORD_ONLY and name not in known
    ]
    rest = [p for p in known.values() if p.kind is Parameter.VAR_KEYWORD]
    return signature.replace(
        parameters=[*(p for p in known.values() if p not in rest), *more, *rest]
    )
