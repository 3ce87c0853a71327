"""A session: the calls of one request, and their cached tensors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.generation import Generation
from dit_cache_fx.runtime.tracking.hooks import ForwardPasses
from dit_cache_fx.runtime.tracking.scope import Scope
from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.strategies.timesteps import Timesteps, given_timesteps

#: the largest number of branches of a session with cached tensors
MAX_BRANCHES = 8
#: the largest number of known branches of a session, with cached tensors or without
MAX_KNOWN = 16
#: the largest number of calls that are recorded in a generation
MAX_RECORDS = 4096


class Session:
    """The calls of one request: `with session:` around each of them, any number of times.

    `cached.new_session()` makes one. It has its own generation and branches, and never reuses the
    tensors of another session. `close()` frees its tensors, and so does dropping it. Sessions are
    context-local: threads and asyncio tasks do not see each other's.

    Raises:
        OptionError: A closed session is entered.

    Example:
        >>> session = cached.new_session()
        >>> with session:
        ...     noise = cached(sample, timestep, prompt)
        >>> session.bytes_held > 0
        True
        >>> session.close()
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._closed = False
        #: whether a user has made it, for one request; else it is of all calls of a thread
        self.of_one_request = True
        #: one call at a time
        self.lock = threading.RLock()
        #: the step index that the user has set, in place of the timestep
        self.explicit: int | None = None
        self.forward_passes = ForwardPasses()
        self.branches: list[Branch] = []
        self.newest: Generation | None = None
        self.records: deque[Any] = deque(maxlen=MAX_RECORDS)
        self.noted: Generation | None = None  # the generation of `records`
        self.calls = 0
        self.starved = 0  # calls in a row that computed for lack of state
        self.captured = 0  # calls in a row that needed a capture
        self._timesteps: Timesteps | None = None

    def __enter__(self) -> Session:
        if self._closed:
            raise OptionError("session", "closed", "a new one: cached.new_session()")
        self._scope.enter(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._scope.leave(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.bytes_held} bytes held"
        return f"<Session, {state}>"

    @property
    def timesteps(self) -> Timesteps | None:
        """The timesteps of this request's steps; None if the model's own apply.

        Set them before the request begins: a sequence, tensor or array (one-dimensional, in the
        unit of the model's timestep), or a function that returns them and is called at the first
        call of each generation. A request with another number of steps than the model's default is
        then scheduled by its own timesteps.

        Raises:
            OptionError: The new value is no flat sequence of finite numbers.
        """
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Timesteps | None) -> None:
        self._timesteps = given_timesteps(timesteps)

    @property
    def closed(self) -> bool:
        """Whether the session is closed and cannot be entered again."""
        return self._closed

    def is_of(self, scope: Scope) -> bool:
        """Return whether it belongs to the cached model with this scope."""
        return self._scope is scope

    @property
    def bytes_held(self) -> int:
        """The number of bytes that its branches hold."""
        return sum(tensor.nbytes for branch in self.branches for tensor in branch.cached)

    def close(self) -> None:
        """Free the cached tensors. A closed session cannot be entered again."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        """Forget the cached tensors and the place in the generation."""
        self.explicit, self.newest, self.branches, self.starved = None, None, [], 0

    def forget(self) -> None:
        """Forget the cached tensors; the generation continues."""
        for branch in self.branches:
            branch.forget()

    def end(self, count: StepCount) -> None:
        """The newest generation has ended: learn its steps."""
        if self.newest is not None:
            count.ended(self.newest.position.index + 1, self.newest.values)

    def of(self, key: Hashable, context: tuple[str, ...]) -> list[Branch]:
        """Return the known branches of a signature and context."""
        return [b for b in self.branches if b.key == key and b.context == context]

    def number_of(self, branch: Branch) -> int:
        """Return its index in its generation, signature and context, for reports."""
        alike = [
            b for b in self.of(branch.key, branch.context) if b.generation is branch.generation
        ]
        return next((i for i, b in enumerate(alike) if b is branch), len(alike))

    # --- what is held is bounded -----------------------------------------------------------------

    def add(self, branch: Branch, replaced: Branch | None, new: bool) -> bool:
        """Add a branch, in the place of another one if it replaces that.

        Drops other branches' tensors to make room; returns whether it could keep its own. For a
        `new` branch, those of its kind that the step has not called are dropped: it may be one of
        them.
        """
        former = branch if replaced is None else replaced
        if former not in self.branches:
            self.branches.append(branch)
        elif former is not branch:
            self.branches[self.branches.index(former)] = branch
        while len(self.branches) > MAX_KNOWN:
            empty = [b for b in self.branches if not b.cached and b is not branch]
            oldest = min(empty, key=lambda b: b.called)
            oldest.generation.crowded = True
            self.branches.remove(oldest)
        holding = [b for b in self.branches if b.cached]
        if len(holding) <= MAX_BRANCHES:
            return True
        others = [b for b in holding if b is not branch and _gives_way(b, branch, new)]
        yielding = min(others or [branch], key=lambda b: b.called)
        yielding.forget()
        return yielding is not branch


def _gives_way(branch: Branch, other: Branch, new: bool) -> bool:
    """Return whether it is of another generation than `other`, or missed its newest steps.

    Until a second step begins, the calls of a step are unknown.
    """
    if branch.generation is not other.generation:
        return True
    newest = branch.generation.position.index
    alike = (branch.key, branch.context) == (other.key, other.context)
    return newest == 0 or branch.answered < newest - (0 if new and alike else 1)
