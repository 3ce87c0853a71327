"""Threads that run graphs of one model share its modules, with what is set there meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Turns:
    """Lets runs go side by side; those that set attributes of modules go alone.

    A thread may enter it again. `needed`: whether any forward of the model is known to set them.
    """

    def __init__(self) -> None:
        self.needed = False
        self._change = threading.Condition()
        self._beside: list[int] = []  # threads, once for each time that they have entered
        self._alone: list[int] = []
        self._waiting = 0  # threads that want to go alone

    def of_model(self) -> AbstractContextManager[None]:
        """For a run of the model itself: alone where forward may set attributes."""
        return self.alone() if self.needed else nullcontext()

    def beside(self) -> AbstractContextManager[None]:
        """Within it nobody else goes alone."""
        return _Beside(self)

    def _enter_beside(self) -> int:
        """Come in; returns what to leave with. Takes the lock only where somebody is in the way.

        Whoever goes alone says so before it looks who is here, and this comes in before it looks
        who goes alone: one of the two sees the other.
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
        """Within it no other thread is in here."""
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


class _Beside(AbstractContextManager[None]):
    """A run beside others: entered for each graph of each call."""

    __slots__ = ("_thread", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        self._thread = self._turns._enter_beside()

    def __exit__(self, *error: object) -> None:
        self._turns._leave_beside(self._thread)
