"""accelerate's hook on a whole model (offloading, device maps): it runs around a cached call.

Such a hook moves the weights before the model's own forward. It must not do that while a graph is
traced: what is moved there would be taken for a part of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def outer_hook(model: nn.Module) -> Any:
    """Return the hook that wraps the model's forward; None if there is none."""
    forward = vars(model).get("forward")
    if not isinstance(forward, functools.partial) or "_old_forward" not in vars(model):
        return None
    return vars(model).get("_hf_hook") if forward.func.__module__ == "accelerate.hooks" else None


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """Return the model's forward without that hook."""
    forward: Callable[..., Any] = (
        model.forward if outer_hook(model) is None else vars(model)["_old_forward"]
    )
    return forward


def before_call(hook: Any, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Run the hook before a call; return the arguments of the call."""
    return hook.pre_forward(model, *args, **kwargs)  # type: ignore[no-any-return]


def after_call(hook: Any, model: nn.Module, output: Any) -> Any:
    """Run the hook after a call; return the output."""
    return hook.post_forward(model, output)
