"""Which generation, step and branch each call belongs to, over all signatures and contexts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from dit_cache_fx.runtime.branches import Session
from dit_cache_fx.runtime.generation import Generation, Moment
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.strategies import Course
from dit_cache_fx.values.identity import Seen

#: most generations (signatures, contexts) whose tensors are held at one time
MAX_SESSIONS = 8


class SessionKey(NamedTuple):
    """What a generation is told apart by: its input signature, the graph, the cache context."""

    inputs: Hashable
    serial: int
    context: str | None


class Tracker:
    """Where the calls of one cached model stand.

    `explicit`: the step index that the user has set, instead of the timestep's value. `contexts`:
    the names of the CFG branches that the user is in, the innermost last. `count`: how many steps
    a generation has.
    """

    def __init__(self, count: StepCount) -> None:
        self.count = count
        self.explicit: int | None = None
        self.contexts: list[str] = []
        self.sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._newest: Generation | None = None

    def clear(self) -> None:
        """Forget what is held and where the generation stands; its steps are counted."""
        self._ended()
        self.forget()
        self.explicit = None
        self._newest = None

    def forget(self) -> None:
        """Forget what is held."""
        self.sessions.clear()

    @property
    def context(self) -> str | None:
        """The name of the CFG branch that the user is in."""
        return self.contexts[-1] if self.contexts else None

    @property
    def current_step(self) -> int:
        """The step index of the newest call, 0 before the first."""
        return self._newest.moment.index if self._newest is not None else 0

    @property
    def num_steps(self) -> int | None:
        """How many steps the newest generation is expected to have; None where not known."""
        return self._newest.course.num_steps if self._newest is not None else None

    @property
    def course(self) -> Course | None:
        """What is known of the newest generation's steps; None before the first call."""
        return self._newest.course if self._newest is not None else None

    def session(self, inputs: Hashable, serial: int) -> Session:
        """The session of a call; the one that was used the longest ago gives way.

        Where another graph answers calls like those before, the generation goes on.
        """
        key = SessionKey(inputs, serial, self.context)
        if key not in self.sessions:
            like = (s for k, s in self.sessions.items() if k[::2] == key[::2])
            before = next(like, Session())
            at = before.generation, before.moment
            self.sessions[key] = Session(serial, self.context, *at)
        self.sessions.move_to_end(key)
        while len(self.sessions) > MAX_SESSIONS:
            self.sessions.popitem(last=False)
        return self.sessions[key]

    def enter(self, session: Session, value: float, conditioning: Seen) -> bool:
        """Move the session to the generation and moment of a call with this timestep.

        A session without a generation, or whose own has ended, joins the newest one when the value
        fits: it is another branch (with other text, say) of a step under way. Returns whether the
        step has had more calls than branches are kept apart.
        """
        explicit = self.explicit is not None
        for generation in (session.generation, self._newest):
            if generation is None:
                continue
            moment = generation.moment.advanced(value, explicit)
            joins = generation is session.generation or generation.takes(
                value, explicit, conditioning
            )
            if moment is not None and joins:
                return session.enter(generation, moment)
        self._ended()
        course = self.count.course(None if explicit else value)
        fresh = Generation(Moment(value, explicit=explicit), course)
        return session.enter(fresh, fresh.moment)

    def _ended(self) -> None:
        if self._newest is not None:
            self.count.ended(self._newest.moment.index + 1, self._newest.values)

    def done(self, session: Session, conditioning: Seen) -> None:
        """The session's call has succeeded."""
        self._newest = session.generation
        if self._newest is not None:
            self._newest.conditioning = conditioning
            self._newest.note(self._newest.moment)


class CacheContext(AbstractContextManager[None]):
    """Within it calls belong to the branch `name`; `inner` is entered beside it.

    A class and a list, since `torch.compile` loses what a generator does behind its `yield`, and an
    attribute that is set back to what it was.
    """

    def __init__(
        self, tracker: Tracker, name: str, inner: AbstractContextManager[Any] | None
    ) -> None:
        self._tracker = tracker
        self._name = name
        self._inner = inner

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()
        self._tracker.contexts.append(self._name)

    def __exit__(self, *error: Any) -> bool | None:
        self._tracker.contexts.pop()
        return None if self._inner is None else self._inner.__exit__(*error)
