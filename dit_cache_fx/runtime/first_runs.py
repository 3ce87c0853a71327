"""First runs go alone: what is compiled then is compiled once, and found by the others."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class FirstRuns:
    """Lets the first run of each kind go alone; all others go side by side.

    `torch.compile` itself compiles a function once for each thread that waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done: set[Hashable] = set()

    @contextmanager
    def alone(self, kind: Hashable = None) -> Iterator[bool]:
        """Gives whether this is the first run of `kind`: until it ends, the others wait here.

        One that raises was none.
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
