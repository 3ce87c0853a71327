"""A `torch.autograd.Function` in the model's own code, while that is traced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function

_DEFAULT = Function.setup_context


@contextmanager
def forward_only() -> Iterator[None]:
    """Within it, in this thread, an autograd function is the operators of its forward.

    Functorch refuses those that are written in the older way. A cached model computes no gradients,
    so what a function would keep for them is not needed. To be entered under `CAPTURING`.
    """
    owner, original = threading.get_ident(), vars(Function)["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return original.__get__(None, cls)(*args, **kwargs)
        older = cls.setup_context is _DEFAULT
        return cls.forward(*((_NoContext(len(args)),) if older else ()), *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]


class _NoContext:
    """In the place of a function's context: takes whatever is kept for a backward pass."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None
