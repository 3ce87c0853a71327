"""Make first runs exclusive: the graph is compiled once, and other threads find the result."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class FirstRuns:
    """Makes the first run of each kind exclusive; all others run concurrently.

    `torch.compile` itself compiles a function once for each thread that waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done: set[Hashable] = set()

    @contextmanager
    def alone(self, kind: Hashable = None) -> Iterator[bool]:
        """Yield whether this is the first run of `kind`; until it ends, the others wait.

        A run that raises does not count.
        """
        if kind in self._done:
            yield False
            return
        with self._lock:
            first = kind not in self._done
            if first:
                yield True
                self._done.add(kind)
        if not first:
            yield False
