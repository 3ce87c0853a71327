"""Replace a model's `forward` by that of a cached model."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any
from weakref import ref

import torch
from torch import nn

from dit_cache_fx._torch import not_a_compiled_frame, traced_here
from dit_cache_fx.cached_model import CachedModel, original
from dit_cache_fx.capture.intercept import capturing
from dit_cache_fx.errors import CaptureError

_NOTHING = object()
_TWICE = (
    "a helper is enabled on the model of this cached model: call the model itself, or disable() "
    "the helper"
)


class InstalledForward:
    """Adds caching to a model object itself, for code that cannot be given another object.

    It replaces the model's `forward` and calls the cached model. When that asks the model for its
    own answer, it calls the previous forward. `owner` is the object that may remove it.
    """

    def __init__(self, cached: CachedModel, owner: object) -> None:
        model = original(cached)
        functools.update_wrapper(self, model.forward)
        self._before = vars(model).get("forward", _NOTHING)
        self._forward = model.forward
        self._cached: CachedModel | None = cached
        self._here = threading.local()  # `inside`: whether the cached model calls
        self._owner = ref(owner)
        model.forward = self

    @not_a_compiled_frame
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cached = self._cached
        if cached is None:
            return self._forward(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return CachedModel._traced(cached, self._forward, args, kwargs)
        if getattr(self._here, "inside", False):
            return self._forward(*args, **kwargs)
        if traced_here((*args, *kwargs.values())):
            return CachedModel._traced(cached, self._forward, args, kwargs)
        if capturing():
            raise CaptureError(_TWICE)
        self._here.inside = True
        try:
            return cached.forward(*args, **kwargs)
        finally:
            self._here.inside = False

    @property
    def owned(self) -> bool:
        """Return whether it is in use and its owner still exists."""
        return self._cached is not None and self._owner() is not None

    def remove(self) -> None:
        """Restore the previous forward; below later hooks it stays and passes calls on."""
        if self._cached is None:
            return
        model, self._cached = original(self._cached), None
        if vars(model).get("forward") is not self:
            return
        if self._before is _NOTHING:
            del model.forward
        else:
            model.forward = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the previous forward, bound to the copy of the model."""
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> Any:
        return functools.partial, (self._forward,)


def installed_on(model: nn.Module) -> InstalledForward | None:
    """Return the installed forward of a model, if there is one."""
    forward = vars(model).get("forward")
    return forward if isinstance(forward, InstalledForward) else None
