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

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within it nobody else goes alone."""
        thread = threading.get_ident()
        with self._change:
            self._change.wait_for(lambda: self._may_go_beside(thread))
            self._beside.append(thread)
        try:
            yield
        finally:
            self._left(self._beside, thread)

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
            self._left(self._alone, thread)

    def _may_go_beside(self, thread: int) -> bool:
        if thread in self._beside or thread in self._alone:
            return True
        return not self._alone and not self._waiting

    def _left(self, place: list[int], thread: int) -> None:
        with self._change:
            place.remove(thread)
            self._change.notify_all()
