"""Intercept and answer the calls of chosen modules while a model's forward runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from dit_cache_fx._torch import not_a_compiled_frame
from dit_cache_fx.capture.turns import changing_modules

#: (module, its name, its real call, args, kwargs) -> the result for the caller
Handler = Callable[[nn.Module, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_CAPTURING = ContextVar("dit_cache_fx_capturing", default=False)
#: held while seams are added or removed, never while a module runs
_SEAMS = threading.Lock()


@contextmanager
def intercepted(names: Mapping[nn.Module, str], handler: Handler) -> Iterator[None]:
    """Send calls of the modules in `names` to `handler`.

    This covers only calls of this thread, and only the outermost: modules inside a handled one run
    normally. Hooks, compiled blocks (`block.compile()`) and replaced forwards are part of the call.
    """
    interception = _Interception(names, handler)
    token = _CAPTURING.set(True)
    try:
        interception.enter(names)
        yield
    finally:
        interception.leave(names)
        _CAPTURING.reset(token)


@not_a_compiled_frame
def capturing() -> bool:
    """Return whether this thread is capturing."""
    return _CAPTURING.get()


class _Interception:
    """The handling of one capture's module calls."""

    def __init__(self, names: Mapping[nn.Module, str], handler: Handler) -> None:
        self._names = names
        self._handler = handler
        self._thread = threading.get_ident()
        self._seams: dict[nn.Module, _Seam] = {}
        self.inside = False  # a module is being handled

    def enter(self, modules: Iterable[nn.Module]) -> None:
        """Intercept this thread's calls of `modules` from now on."""
        with changing_modules(), _SEAMS:
            for module in modules:
                self._seams[module] = _seam(module)
                self._seams[module].add(self._thread, self)

    def leave(self, modules: Iterable[nn.Module]) -> None:
        """Stop intercepting them."""
        with changing_modules(), _SEAMS:
            for module in [m for m in modules if m in self._seams]:
                self._seams.pop(module).remove(self._thread, self)

    def handle(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inside = True
        try:
            return self._handler(module, self._names[module], self._run, args, kwargs)
        finally:
            self.inside = False

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a module without interceptions: otherwise compiled parts would compile again."""
        inside = [m for m in module.modules() if m in self._seams]
        self.leave(inside)
        try:
            return nn.Module.__call__(module, *args, **kwargs)
        finally:
            self.enter(inside)


class _Seam:
    """An attribute of one module object that replaces the way it is called.

    `Module.__call__` runs the module's `_compiled_call_impl` if there is one, otherwise its
    `_call_impl`. Only a capturing thread is redirected; the calls of all others pass through. (Code
    that Dynamo compiles for such a call meanwhile also passes, and is compiled again afterwards.)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        compiled = module._compiled_call_impl is not None
        self._attribute = "_compiled_call_impl" if compiled else "_call_impl"
        self._own = self._attribute in vars(module)
        self._before: Callable[..., Any] = getattr(module, self._attribute)
        self._waiting: dict[int, list[_Interception]] = {}  # by thread
        vars(module)[self._attribute] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._before(*args, **kwargs)
        here = self._waiting.get(threading.get_ident())
        if not here or here[-1].inside:
            return self._before(*args, **kwargs)
        return here[-1].handle(self.module, args, kwargs)

    def add(self, thread: int, interception: _Interception) -> None:
        """Add an interception; the newest one of a thread gets its calls."""
        self._waiting.setdefault(thread, []).append(interception)

    def remove(self, thread: int, interception: _Interception) -> None:
        """Remove an interception; the last one restores the module's own attribute."""
        self._waiting[thread].remove(interception)
        if not self._waiting[thread]:
            del self._waiting[thread]
        if self._waiting or vars(self.module).get(self._attribute) is not self:
            return
        if self._own:
            vars(self.module)[self._attribute] = self._before
        else:
            del vars(self.module)[self._attribute]

    def __reduce__(self) -> Any:
        """Copy the module without a seam."""
        return getattr, (self.module, self._attribute)


def _seam(module: nn.Module) -> _Seam:
    """Return the seam of a module; create it if there is none."""
    own = vars(module)
    known = [own.get(name) for name in ("_compiled_call_impl", "_call_impl")]
    return next((s for s in known if isinstance(s, _Seam)), None) or _Seam(module)
