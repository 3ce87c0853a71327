"""A `torch.autograd.Function` in the model's own code, while that is traced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.autograd import Function

_DEFAULT = Function.setup_context


#: held while the patch is put in or taken out
_PATCHING = threading.Lock()


@contextmanager
def forward_only() -> Iterator[None]:
    """Within it, in this thread, an autograd function is the operators of its forward.

    Functorch refuses those that are written in the older way. A cached model computes no gradients,
    so what a function would keep for them is not needed. Threads that are in it at a time share
    one patch; the last one to leave takes it out.
    """
    thread = threading.get_ident()
    with _PATCHING:
        patch: Any = vars(Function)["apply"]
        if not isinstance(patch, _Apply):
            patch = Function.apply = _Apply(patch)  # type: ignore[assignment, method-assign]
        patch.threads.append(thread)
    try:
        yield
    finally:
        with _PATCHING:
            patch.threads.remove(thread)
            if not patch.threads:
                Function.apply = patch.before  # type: ignore[method-assign]


class _Apply:
    """In the place of `Function.apply`."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.threads: list[int] = []  # those that want the forward only

    def __get__(self, instance: object, cls: type[Function]) -> Callable[..., Any]:
        here = threading.get_ident() in self.threads
        return partial(_forward, cls) if here else self.before.__get__(instance, cls)  # type: ignore[no-any-return]


def _forward(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    older = cls.setup_context is _DEFAULT
    return cls.forward(*((_NoContext(len(args)),) if older else ()), *args, **kwargs)


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
