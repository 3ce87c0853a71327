"""The current session and cache contexts of the running code.

They are context-local (`contextvars`): threads and asyncio tasks do not see each other's. Dynamo
traces no context variables: if it traces the cached model as a part of a user's own function, there
is no host and no session, and the names come from a list, which it guards.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch


class Splits:
    """Base class of batches, which split calls while they are entered."""


class Scope:
    """The entered frames of one cached model, the innermost last.

    A frame is a session, a batch of sessions, or the name of a branch.
    """

    def __init__(self) -> None:
        self._frames: ContextVar[tuple[Any, ...]] = ContextVar("dit_cache_fx", default=())
        self._traced: list[str] = []
        self._batches: list[object] = []  # a list, like `_traced`: Dynamo guards it

    def enter(self, frame: object) -> None:
        """Enter a session, a batch or a named branch."""
        if isinstance(frame, str):
            self._traced.append(frame)
        elif isinstance(frame, Splits):
            self._batches.append(frame)
        if not torch.compiler.is_dynamo_compiling():
            self._frames.set((*self._frames.get(), frame))

    def leave(self, frame: object) -> None:
        """Leave the innermost entry of this frame."""
        if isinstance(frame, str) and frame in self._traced:
            self._traced.remove(frame)
        elif isinstance(frame, Splits) and self._batches:
            self._batches.pop()
        if torch.compiler.is_dynamo_compiling():
            return
        frames = self._frames.get()
        place = max((i for i, f in enumerate(frames) if f is frame), default=None)
        if place is not None:
            self._frames.set((*frames[:place], *frames[place + 1 :]))

    @property
    def splits(self) -> bool:
        """Return whether a batch is entered anywhere; Dynamo may call this."""
        return bool(self._batches)

    @property
    def caller(self) -> Any:
        """Return the innermost session or batch; None outside of any."""
        frames = self._frames.get()
        return (
            next((f for f in reversed(frames) if not isinstance(f, str)), None) if frames else None
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the branch, the outermost first."""
        if torch.compiler.is_dynamo_compiling():
            return tuple(self._traced)
        frames = self._frames.get()
        return tuple([f for f in frames if isinstance(f, str)]) if frames else ()


class CacheContext(AbstractContextManager[None]):
    """Calls inside belong to the branch `name`; `inner` is entered as well."""

    def __init__(self, scope: Scope, name: str, inner: AbstractContextManager[Any] | None) -> None:
        self._scope = scope
        self._name = name
        self._inner = inner

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()
        self._scope.enter(self._name)

    def __exit__(self, *error: Any) -> bool | None:
        self._scope.leave(self._name)
        return None if self._inner is None else self._inner.__exit__(*error)
