"""Which hooks stand before a model's layers right now.

Guidance that perturbs the model (skipped layers, attention without scores) calls it again with the
very same arguments, and hooks on its layers make the difference. What hooks there are is part of
what tells a branch.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

#: of each layer with hooks: its place, how often its forward is wrapped, hooks before and behind it
Hooked = tuple[tuple[int, int, int, int], ...]


_BEFORE, _BEHIND = "_forward_pre_hooks", "_forward_hooks"


class Hooks:
    """Tells the hooks of a model's layers, as they were when it was captured."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [vars(module) for module in model.modules() if module is not model]
        self._hooks = [own[name] for own in self._layers for name in (_BEFORE, _BEHIND)]

    def now(self) -> Hooked:
        """Those that there are; the same for each call of a branch."""
        hooks = any(self._hooks)
        some = [
            (place, _wrapped(own.get("forward")), len(own[_BEFORE]), len(own[_BEHIND]))
            for place, own in enumerate(self._layers)
            if "forward" in own or (hooks and (own[_BEFORE] or own[_BEHIND]))
        ]
        return tuple(layer for layer in some if any(layer[1:]))


def _wrapped(forward: Any) -> int:
    """How often a layer's forward is wrapped: 0 for its own, also where a hook has put it back."""
    depth = 0
    while forward is not None and not isinstance(forward, MethodType):
        depth, forward = depth + 1, getattr(forward, "__wrapped__", None)
    return depth
