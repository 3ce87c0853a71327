"""The sessions of one cached model, and which one is current."""

from __future__ import annotations

import threading
from weakref import WeakSet, ref

from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.scope import Scope
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.step_count import StepCount


class Tracker:
    """Knows the current session: the one that is entered, else this thread's own.

    `count`: how many steps a generation has.
    """

    def __init__(self, count: StepCount) -> None:
        self.count = count
        self.scope = Scope()
        self._sessions: WeakSet[Session] = WeakSet()
        self._own = threading.local()
        self._called: ref[Session] | None = None
        self._lock = threading.Lock()

    def new_session(self) -> Session:
        """A session that is not entered yet."""
        session = Session(self.scope)
        with self._lock:
            self._sessions.add(session)
        return session

    @property
    def session(self) -> Session:
        """The current session. A batch of sessions is none."""
        entered = self.scope.caller
        if isinstance(entered, Session):
            return entered
        own: Session | None = getattr(self._own, "session", None)
        if own is None:
            own = self._own.session = self.new_session()
            own.of_one_request = False
        return own

    @property
    def batch(self) -> Batch | None:
        """The batch that a call is of, if it is of one."""
        entered = self.scope.caller
        return entered if isinstance(entered, Batch) else None

    @property
    def context(self) -> tuple[str, ...]:
        """The names of the branch that the calling code is in, the outermost first."""
        return self.scope.names

    @property
    def reported(self) -> Session:
        """The session that reports are about: the current one, else the one called last."""
        current = self.session
        called = self._called() if self._called is not None else None
        return current if current.records or called is None else called

    def called(self, session: Session) -> None:
        """Note a call."""
        self._called = ref(session)

    def sessions(self) -> list[Session]:
        """All sessions that are alive."""
        with self._lock:
            return list(self._sessions)

    def clear(self) -> None:
        """Forget what is held and where the generations stand; their steps are counted."""
        self.session.end(self.count)
        for session in self.sessions():
            session.clear()

    def forget(self) -> None:
        """Forget what is held."""
        for session in self.sessions():
            session.forget()
