"""The sessions of one cached model, and the current one."""

from __future__ import annotations

import threading
from weakref import WeakSet, ref

from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.tracking.scope import Scope
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.step_count import StepCount


class Tracker:
    """Knows the current session: the entered one, otherwise the thread's own.

    `count`: the number of steps of a generation.
    """

    def __init__(self, count: StepCount) -> None:
        self.count = count
        self.scope = Scope()
        self._sessions: WeakSet[Session] = WeakSet()
        self._own = threading.local()
        self._called: ref[Session] | None = None
        self._lock = threading.Lock()

    def new_session(self) -> Session:
        """Return a session that is not entered yet."""
        session = Session(self.scope)
        with self._lock:
            self._sessions.add(session)
        return session

    @property
    def caller(self) -> Session | Batch:
        """The current batch of sessions, or the current session."""
        entered = self.scope.caller
        return entered if isinstance(entered, (Session, Batch)) else self._of_thread()

    @property
    def session(self) -> Session:
        """The current session. A batch of sessions is none."""
        caller = self.caller
        return caller if isinstance(caller, Session) else self._of_thread()

    def _of_thread(self) -> Session:
        own: Session | None = getattr(self._own, "session", None)
        if own is None:
            own = self._own.session = self.new_session()
            own.of_one_request = False
        return own

    @property
    def batch(self) -> Batch | None:
        """The batch of the current call, if there is one."""
        entered = self.scope.caller
        return entered if isinstance(entered, Batch) else None

    @property
    def context(self) -> tuple[str, ...]:
        """The names of the calling code's branch, the outermost first."""
        return self.scope.names

    @property
    def reported(self) -> Session:
        """The session for reports: the current one, otherwise the one called last."""
        current = self.session
        called = self._called() if self._called is not None else None
        return current if current.records or called is None else called

    def called(self, session: Session) -> None:
        """Record a call."""
        self._called = ref(session)

    def sessions(self) -> list[Session]:
        """Return all sessions that are alive."""
        with self._lock:
            return list(self._sessions)

    def clear(self) -> None:
        """Forget the cached tensors and the place in the generations; their steps are counted."""
        self.session.end(self.count)
        for session in self.sessions():
            session.clear()

    def forget(self) -> None:
        """Forget the cached tensors."""
        for session in self.sessions():
            session.forget()
