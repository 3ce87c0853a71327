"""Which hooks stand before a model's layers right now.

Guidance that perturbs the model (skipped layers, attention without scores) calls it again with the
very same arguments, and hooks on its layers make the difference. What hooks there are is part of
what tells a branch.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from dit_cache_fx.runtime.timestep_value import TimestepValue, distance

_BEFORE, _BEHIND = "_forward_pre_hooks", "_forward_hooks"


#: of how many sets of hooks it is known which pass they belong to
MAX_KNOWN = 64


class Hooked(NamedTuple):
    """Layers by their places. `wrapped`: how often their forward is wrapped, where it is.

    `hooks`: how many hooks run before and behind them, where any do.
    """

    wrapped: tuple[tuple[int, int], ...] = ()
    hooks: tuple[tuple[int, int, int], ...] = ()


NO_HOOKS = Hooked()


class Hooks:
    """Tells the hooks of a model's layers, as they were when it was captured."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [vars(module) for module in model.modules() if module is not model]
        self._hooks = [own[name] for own in self._layers for name in (_BEFORE, _BEHIND)]

    def now(self) -> Hooked:
        """Those that there are."""
        replaced = [(i, own["forward"]) for i, own in enumerate(self._layers) if "forward" in own]
        wrapped = tuple([(i, depth) for i, forward in replaced if (depth := _wrapped(forward))])
        return Hooked(wrapped, self._registered() if any(self._hooks) else ())

    def _registered(self) -> tuple[tuple[int, int, int], ...]:
        counts = [(i, len(own[_BEFORE]), len(own[_BEHIND])) for i, own in enumerate(self._layers)]
        return tuple([count for count in counts if any(count[1:])])


class Passes:
    """Tells the passes of a step apart by the hooks that they find.

    A wrapped forward always counts. Registered hooks that no call has found before are another pass
    where the timestep stands still. Where it moves on, the step's first pass has them from now on:
    what is registered in the middle of a generation only looks on, or is there for all passes.
    """

    def __init__(self) -> None:
        self._value: TimestepValue | None = None
        self._first = 0  # the pass that the newest step began with
        self._newest = 0  # the highest number of a pass
        self._known: dict[Hashable, int] = {}  # registered hooks -> a pass

    def of(self, value: TimestepValue, hooked: Hooked) -> Hashable:
        """The pass of a call at this timestep; nothing is noted."""
        return hooked.wrapped, self._number(value, hooked)

    def note(self, value: TimestepValue, hooked: Hooked) -> None:
        """A call at this timestep has succeeded."""
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
    """How often a layer's forward is wrapped: 0 for its own, also where a hook has put it back."""
    depth = 0
    while forward is not None and not isinstance(forward, MethodType):
        depth, forward = depth + 1, getattr(forward, "__wrapped__", None)
    return depth
