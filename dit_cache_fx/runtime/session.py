"""A session: the calls of one request, and what is held for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.generation import Generation
from dit_cache_fx.runtime.hooked import Passes
from dit_cache_fx.runtime.scope import Scope
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.strategies.timesteps import Timesteps, given_timesteps

#: most branches of a session whose tensors are held at one time
MAX_BRANCHES = 8
#: most branches of a session that are known, held or not
MAX_KNOWN = 16
#: most calls of a generation that are noted
MAX_RECORDS = 4096


class Session:
    """The calls of one request: `with session:` around each of them, any number of times.

    `cached.new_session()` makes one. It has a generation and branches of its own, and never reuses
    what another session holds. `close()` frees its tensors, and so does dropping it. Sessions are
    context-local: threads and asyncio tasks do not see each other's.

    Raises:
        OptionError: A closed session is entered.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._closed = False
        #: whether a user has made it, for one request; else it is of all calls of a thread
        self.of_one_request = True
        #: one call at a time
        self.lock = threading.RLock()
        #: the step index that the user has set, instead of the timestep's value
        self.explicit: int | None = None
        self.passes = Passes()
        self.branches: list[Branch] = []
        self.newest: Generation | None = None
        self.records: deque[Any] = deque(maxlen=MAX_RECORDS)
        self.noted: Generation | None = None  # whose steps are in `records`
        self.calls = 0
        self.starved = 0  # calls on end that computed for want of state
        self.captured = 0  # calls on end that needed a graph of their own
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
        """The timesteps of this request's steps, one for each; None where the model's own hold.

        Set them before the request begins: a sequence, tensor or array, or a function that is asked
        at a generation's first call. A request of another number of steps has its own plan by them.
        """
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Timesteps | None) -> None:
        self._timesteps = given_timesteps(timesteps)

    @property
    def closed(self) -> bool:
        """Whether it cannot be entered any more."""
        return self._closed

    def is_of(self, scope: Scope) -> bool:
        """Whether it is of the cached model whose scope this is."""
        return self._scope is scope

    @property
    def bytes_held(self) -> int:
        """The bytes held for its branches."""
        return sum(held.nbytes for branch in self.branches for held in branch.held)

    def close(self) -> None:
        """Free the held tensors. A closed session cannot be entered again."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        """Forget the held tensors and the place in the generation."""
        self.explicit, self.newest, self.branches, self.starved = None, None, [], 0

    def forget(self) -> None:
        """Forget what is held; the generation goes on."""
        for branch in self.branches:
            branch.forget()

    def end(self, count: StepCount) -> None:
        """The newest generation has ended: learn its steps."""
        if self.newest is not None:
            count.ended(self.newest.position.index + 1, self.newest.values)

    def of(self, key: Hashable, context: tuple[str, ...]) -> list[Branch]:
        """The known branches of a signature and context."""
        return [b for b in self.branches if b.key == key and b.context == context]

    def number_of(self, branch: Branch) -> int:
        """Its place among the branches of its generation, signature and context, for reports."""
        alike = [
            b for b in self.of(branch.key, branch.context) if b.generation is branch.generation
        ]
        return next((i for i, b in enumerate(alike) if b is branch), len(alike))

    # --- what is held is bounded -----------------------------------------------------------------

    def add(self, branch: Branch, replaced: Branch | None, new: bool) -> bool:
        """Know a branch, in the place of another one if it replaces that.

        What must give way for what it holds does. Returns whether it could keep that. For a `new`
        one those of its kind give way that the step has not called: one of them may be it.
        """
        known = [b for b in self.branches if b is branch or b is replaced]
        if known:
            self.branches[self.branches.index(known[0])] = branch
        else:
            self.branches.append(branch)
        while len(self.branches) > MAX_KNOWN:
            empty = [b for b in self.branches if not b.held and b is not branch]
            oldest = min(empty, key=lambda b: b.called)
            oldest.generation.crowded = True
            self.branches.remove(oldest)
        holding = [b for b in self.branches if b.held]
        if len(holding) <= MAX_BRANCHES:
            return True
        others = [b for b in holding if b is not branch and _gives_way(b, branch, new)]
        yielding = min(others or [branch], key=lambda b: b.called)
        yielding.forget()
        return yielding is not branch


def _gives_way(branch: Branch, other: Branch, new: bool) -> bool:
    """Whether it is of another generation than `other`, or was left out of its newest steps.

    Until a second step begins nobody knows what the step's calls are.
    """
    if branch.generation is not other.generation:
        return True
    newest = branch.generation.position.index
    alike = (branch.key, branch.context) == (other.key, other.context)
    return newest == 0 or branch.answered < newest - (0 if new and alike else 1)
