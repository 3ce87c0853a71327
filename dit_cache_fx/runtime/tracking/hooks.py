"""Determine the hooks on a model's layers at a call.

Guidance that perturbs the model (skipped layers, attention without scores) calls it again with the
same arguments, and hooks on its layers make the difference. So the hooks are part of a branch's
identity.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from dit_cache_fx._torch import hooks_registered
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue, distance

_BEFORE, _BEHIND = "_forward_pre_hooks", "_forward_hooks"


#: the largest number of sets of hooks whose pass is known
MAX_KNOWN = 64


class Hooked(NamedTuple):
    """The hooks on a model's layers, by position. `wrapped`: how often a forward is wrapped.

    `hooks`: the number of registered hooks before and after a layer, if there are any.
    """

    wrapped: tuple[tuple[int, int], ...] = ()
    hooks: tuple[tuple[int, int, int], ...] = ()


NO_HOOKS = Hooked()


class Hooks:
    """Reads the hooks on the layers that a model had at its capture."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [vars(module) for module in model.modules() if module is not model]
        self._none_at = -1  # the process's count of hooks when this model had none

    def now(self) -> Hooked:
        """Return the current hooks."""
        hooks, replaced = self._registered(), [own for own in self._layers if "forward" in own]
        if not (hooks or replaced):
            return NO_HOOKS
        return Hooked(self._replaced() if replaced else (), hooks)

    def ids(self) -> tuple[tuple[int, ...], ...]:
        """Return the current hooks by their numbers, which are never given twice."""
        if not self._registered():
            return ()
        return tuple([(i, *own[_BEFORE], *own[_BEHIND]) for i, own in enumerate(self._layers)])

    def _replaced(self) -> tuple[tuple[int, int], ...]:
        depths = [(i, _wrapped(own.get("forward"))) for i, own in enumerate(self._layers)]
        return tuple([depth for depth in depths if depth[1]])

    def _registered(self) -> tuple[tuple[int, int, int], ...]:
        registered = hooks_registered()
        if registered == self._none_at:
            return ()
        counts = [(i, len(own[_BEFORE]), len(own[_BEHIND])) for i, own in enumerate(self._layers)]
        found = tuple([count for count in counts if any(count[1:])])
        if not found:
            self._none_at = registered
        return found


class ForwardPasses:
    """Separates the passes of a step by the hooks on the model.

    A wrapped forward always counts. Registered hooks that no call has seen before are another pass
    if the timestep stands still. If it moves on, they belong to the step's first pass from now on:
    hooks that are registered in the middle of a generation only observe, or serve all passes.
    """

    def __init__(self) -> None:
        self._value: TimestepValue | None = None
        self._first = 0  # the pass that began the newest step
        self._newest = 0  # the highest pass
        self._known: dict[Hashable, int] = {}  # registered hooks -> a pass

    def of(self, value: TimestepValue, hooked: Hooked) -> Hashable:
        """Return the pass of a call at this timestep; nothing is recorded."""
        return hooked.wrapped, self._number(value, hooked)

    def note(self, value: TimestepValue, hooked: Hooked) -> None:
        """Record that a call at this timestep has succeeded."""
        number = self._known[hooked.hooks] = self._number(value, hooked)
        self._newest = max(self._newest, number)
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        if not self._stands_at(value):
            self._value, self._first = value, number

    def _number(self, value: TimestepValue, hooked: Hooked) -> int:
        known = self._known.get(hooked.hooks)
        if known is not None:
            return known
        return self._newest + 1 if self._stands_at(value) else self._first

    def _stands_at(self, value: TimestepValue) -> bool:
        return self._value is not None and distance(self._value, value) == 0


def _wrapped(forward: Any) -> int:
    """Return how often a layer's forward is wrapped: 0 for its own, even if restored by a hook."""
    depth = 0
    while forward is not None and not isinstance(forward, MethodType):
        depth, forward = depth + 1, getattr(forward, "__wrapped__", None)
    return depth
