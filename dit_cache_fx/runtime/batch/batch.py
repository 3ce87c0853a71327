"""A batch: calls whose rows belong to different requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.runtime.tracking.scope import Scope, Splits
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.values.rows import CallRows


class Batch(Splits):
    """Calls whose rows (in dimension 0) belong to several sessions, one row each.

    `cached.batch([session, ...])` makes one. It may be entered again.

    Raises:
        OptionError: A session is closed, or the arguments of a call lack a row for each session.

    Example:
        >>> batch = cached.batch([cached.new_session(), cached.new_session()])
        >>> with batch:
        ...     samples, prompts = torch.cat([sample, sample]), torch.cat([prompt, prompt])
        ...     noise = cached(samples, torch.tensor([900.0, 40.0]), prompts)
    """

    def __init__(
        self, scope: Scope, sessions: Sequence[Session], shared: Collection[str] = ()
    ) -> None:
        self._scope = scope
        self.sessions = _checked(sessions, scope)
        self.shared = _names(shared)

    def __enter__(self) -> Batch:
        self._check_open()
        self._scope.enter(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._scope.leave(self)

    def __repr__(self) -> str:
        return f"<Batch of {len(self.sessions)} sessions>"

    def rows(self, arguments: dict[str, Any], own: Collection[str] = ()) -> CallRows:
        """Split a call into rows. Raises `OptionError` if it is no call of these sessions.

        `own`: the arguments that are the model's own tensors.
        """
        self._check_open()
        unknown = self.shared - arguments.keys()
        given = [name for name in arguments if name.isidentifier() and name not in own]
        if unknown:
            raise OptionError(
                "shared", sorted(unknown), f"the names of the call's arguments: {given}"
            )
        rows = CallRows(arguments, len(self.sessions), self.shared.union(own))
        if not rows.names:
            raise OptionError(
                "sessions",
                f"{len(self.sessions)} of them",
                "one for each row of the call, and no argument has as many rows: "
                + (", ".join(_sizes({n: arguments[n] for n in given})) or "none is a tensor"),
            )
        return rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the locks of these sessions: no other call of them is under way."""
        with ExitStack() as locks:
            for session in sorted(self.sessions, key=id):  # in one order, to avoid a deadlock
                locks.enter_context(session.lock)
            yield

    def _check_open(self) -> None:
        for place, session in enumerate(self.sessions):
            if session.closed:
                raise OptionError(f"sessions[{place}]", session, "a session that is not closed")


def _checked(sessions: Any, scope: Scope) -> tuple[Session, ...]:
    if isinstance(sessions, Session):
        raise OptionError("sessions", sessions, "a list of sessions, one for each row")
    found = tuple(sessions)
    if not found:
        raise OptionError("sessions", [], "at least one session (cached.new_session())")
    for place, session in enumerate(found):
        if not isinstance(session, Session) or not session.is_of(scope):
            what = "a session of this model: cached.new_session()"
            raise OptionError(f"sessions[{place}]", session, what)
        if session in found[:place]:
            raise OptionError(
                f"sessions[{place}]",
                session,
                "a session is one row of a call. Give each branch of classifier-free guidance a "
                "call of its own in a cache_context, or a session of its own",
            )
    return found


def _names(shared: Any) -> frozenset[str]:
    if isinstance(shared, str) or not all(isinstance(name, str) for name in shared):
        raise OptionError("shared", shared, "names of arguments, such as ('img_ids',)")
    return frozenset(shared)


def _sizes(arguments: dict[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            yield f"{name} is {list(value.shape)}"
        elif isinstance(value, (list, tuple)):
            yield f"{name} has {len(value)} items"
