"""How a forward can really be called, whoever has wrapped it.

`inspect.signature` follows `__wrapped__` and takes what it finds there for the wrapper's own. That
is wrong by one argument where one of the two is bound to the model and the other is not.
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
    bound: bool  # without the parameter that the model goes to
    method: bool = False  # surely with it: a function of a class


def called_as(forward: Callable[..., Any]) -> Signature:
    """The parameters of a forward as it is called, without the model.

    Those of a wrapper that takes anything (`*args, **kwargs`) are those of what it says it wraps.
    """
    if isinstance(forward, functools.partial) and _wraps_its_own(forward):
        return _rest(forward)
    if isinstance(forward, types.MethodType):
        found = _found(forward.__func__)
        return found.signature if found.bound else _without(found.signature, 1)
    found = _found(forward)
    return _without(found.signature, 1) if found.method else found.signature


def takes_anything(forward: Callable[..., Any]) -> bool:
    """Whether it takes any number of arguments by position, whatever it wraps."""
    parameters = _own(forward).parameters.values()
    return any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)


def positional_names(model: nn.Module) -> tuple[str, ...]:
    """What the model's class calls the arguments of its forward: the first class that names them.

    For a forward put in its place that takes `*args` and does not say what it wraps.
    """
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        if isinstance(forward, types.FunctionType):
            signature = _without(_found(forward).signature, 1)
            if not any(p.kind in _ANY for p in signature.parameters.values()):
                return tuple(signature.parameters)
    return ()


def _wraps_its_own(forward: functools.partial[Any]) -> bool:
    """Whether a partial call does not say that it wraps another function than it calls."""
    return getattr(forward, "__wrapped__", forward.func) is forward.func


def _own(function: Callable[..., Any]) -> Signature:
    return inspect.signature(function, follow_wrapped=False)


def _found(function: Callable[..., Any]) -> _Found:
    """The parameters of a function, and whether they are without the model's."""
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
    """Whether a function was written in a class: `Model.forward`, not `patch.<locals>.forward`."""
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    return isinstance(function, types.FunctionType) and owner[-1:] not in ("", ">")


def _rest(forward: functools.partial[Any]) -> Signature:
    """What is left to give of a partial call."""
    inner: Any = forward.func
    if isinstance(inner, types.FunctionType):
        found = _found(inner)
        given = len(forward.args) - found.bound  # the model goes to the wrapper's own parameter
        signature = _without(found.signature, given)
    else:
        signature = _without(called_as(inner), len(forward.args))
    left = [p for name, p in signature.parameters.items() if name not in forward.keywords]
    return signature.replace(parameters=left)


def _without(signature: Signature, count: int) -> Signature:
    """A signature without its first positional parameters; `*args` takes any number of them."""
    parameters = list(signature.parameters.values())
    while count > 0 and parameters and parameters[0].kind not in _ANY:
        parameters.pop(0)
        count -= 1
    return signature.replace(parameters=parameters)


def _with_more(signature: Signature, own: Signature) -> Signature:
    """With the keywords that a wrapper takes beside those of what it wraps."""
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
