"""Trace `torch.autograd.Function` in the model's own code by its forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.autograd import Function

_DEFAULT = Function.setup_context


#: held while the patch is applied or removed
_PATCHING = threading.Lock()


@contextmanager
def forward_only() -> Iterator[None]:
    """Replace autograd functions by the operators of their forward, in this thread.

    Functorch refuses functions in the older style. A cached model computes no gradients, so nothing
    needs to be saved for a backward pass. Threads that are inside at the same time share one patch;
    the last one to leave removes it.
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
    """Replaces `Function.apply`."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.threads: list[int] = []  # threads that want the forward only

    def __get__(self, instance: object, cls: type[Function]) -> Callable[..., Any]:
        here = threading.get_ident() in self.threads
        return partial(_forward, cls) if here else self.before.__get__(instance, cls)  # type: ignore[no-any-return]


def _forward(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    older = cls.setup_context is _DEFAULT
    return cls.forward(*((_NoContext(len(args)),) if older else ()), *args, **kwargs)


class _NoContext:
    """Replaces a function's context: accepts everything that is saved for a backward pass."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None
