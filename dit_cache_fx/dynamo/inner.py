"""The compiler that compiles the graphs of `backend`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import inductor_compiler, known_backends, lookup_backend
from dit_cache_fx.errors import OptionError

#: (graph, example inputs) -> the compiled function
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[torch.Tensor]]]
Inner = str | Callable[..., Callable[..., Sequence[torch.Tensor]]]

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def inner_compiler(inner: Inner, mode: str | None, options: Mapping[str, Any] | None) -> Compile:
    """Return `inner` with its mode and options, as `torch.compile` would call it.

    Raises `OptionError` for an unknown backend, or one that does not take these arguments.
    """
    if inner == "inductor":
        return _inductor(mode, options)
    if isinstance(inner, str) and inner not in known_backends():
        raise OptionError("inner", inner, f"one of {known_backends()}, or a callable")
    if not isinstance(inner, str) and not callable(inner):
        raise OptionError("inner", inner, "the name of a backend, or a callable (graph, inputs)")
    compile_graph = lookup_backend(inner)
    given = {"mode": mode if mode != "default" else None, "options": options}
    named = {name: value for name, value in given.items() if value}
    for name, value in named.items():
        if not _takes(compile_graph, name):
            raise OptionError(name, value, f"None: the inner backend {_name(inner)} takes none")
    return lambda gm, inputs: compile_graph(gm, inputs, **named)


def _inductor(mode: str | None, options: Mapping[str, Any] | None) -> Compile:
    if mode is not None and mode not in _MODES:
        raise OptionError("mode", mode, f"one of {list(_MODES)}, or None")
    try:
        return inductor_compiler(mode, dict(options or {}))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        expected = f"options of inductor (torch._inductor.list_options()): {str(error)[:200]}"
        raise OptionError("options", options, expected) from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        inspect.signature(function).bind(None, None, **{name: None})
    except TypeError:
        return False
    return True


def _name(inner: Inner) -> str:
    return inner if isinstance(inner, str) else getattr(inner, "__name__", repr(inner))
