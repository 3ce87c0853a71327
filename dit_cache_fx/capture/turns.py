"""A lock for threads that run graphs of one model while others set attributes of its modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from dit_cache_fx._torch import between_compilations

_OF_MODEL: ContextVar[Turns | None] = ContextVar("dit_cache_fx_of_model", default=None)


class Turns:
    """Lets runs share the model; runs that set attributes of modules are exclusive.

    Reentrant. `needed`: whether any forward of the model is known to set attributes.
    """

    def __init__(self) -> None:
        self.needed = False
        self._change = threading.Condition()
        self._beside: list[int] = []  # threads, once per entry
        self._alone: list[int] = []
        self._waiting = 0  # threads that wait for exclusive access

    @contextmanager
    def of_model(self) -> Iterator[None]:
        """Enter for a run of the model itself: exclusive if forward may set attributes."""
        before = _OF_MODEL.set(self)
        try:
            with self.alone() if self.needed else nullcontext():
                yield
        finally:
            _OF_MODEL.reset(before)

    @property
    def shared(self) -> bool:
        """Whether another thread runs a graph of the model now."""
        return any(thread != threading.get_ident() for thread in [*self._beside])

    def beside(self) -> AbstractContextManager[None]:
        """Enter for a shared run."""
        return _Beside(self)

    def _enter_beside(self) -> int:
        """Enter shared; return the value to leave with. Locks only if a thread is exclusive.

        An exclusive thread announces itself before it looks for others, and a shared one enters
        before it looks for an exclusive one: one of the two sees the other.
        """
        thread = threading.get_ident()
        self._beside.append(thread)
        if self._waiting or self._alone:
            with self._change:
                self._beside.remove(thread)
                self._change.notify_all()
                self._change.wait_for(lambda: self._may_go_beside(thread))
                self._beside.append(thread)
        return thread

    def _leave_beside(self, thread: int) -> None:
        self._beside.remove(thread)
        if self._waiting:
            with self._change:
                self._change.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Enter exclusively: no other thread is inside."""
        thread = threading.get_ident()
        with self._change:
            self._waiting += 1
            try:
                self._change.wait_for(lambda: {*self._beside, *self._alone} <= {thread})
            finally:
                self._waiting -= 1
            self._alone.append(thread)
        try:
            yield
        finally:
            with self._change:
                self._alone.remove(thread)
                self._change.notify_all()

    def _may_go_beside(self, thread: int) -> bool:
        if thread in self._beside or thread in self._alone:
            return True
        return not self._alone and not self._waiting


def changing_modules() -> AbstractContextManager[None]:
    """Enter to change how the modules of the running model are called.

    Dynamo reads a module several times while it compiles a graph: then it must not change.
    """
    turns = _OF_MODEL.get()
    return between_compilations(wait=turns is not None and turns.shared)


class _Beside(AbstractContextManager[None]):
    """A shared run: entered for each graph of each call."""

    __slots__ = ("_thread", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        self._thread = self._turns._enter_beside()

    def __exit__(self, *error: object) -> None:
        self._turns._leave_beside(self._thread)
