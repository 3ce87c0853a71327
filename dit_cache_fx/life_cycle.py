"""What a user can ask of a cached model, whichever way it was made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.report.cache_report import CacheReport, report
from dit_cache_fx.report.explain import Explanation, explain
from dit_cache_fx.report.plot import draw
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.scope import CacheContext
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.strategies.schedule import check_num_steps
from dit_cache_fx.strategies.timesteps import Timesteps, checked_timesteps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LifeCycle:
    """The life cycle of a cache. A subclass says where its bookkeeping and its graphs are."""

    _enabled: bool

    @property
    def _call_log(self) -> CallLog:
        raise NotImplementedError

    def _lowered(self) -> Sequence[Lowered]:
        """The graphs that there are."""
        raise NotImplementedError

    def clear_states(self) -> None:
        """Forget what is held and where the generation stands; keep the graphs."""
        self._call_log.tracker.clear()

    def reset_states(self) -> None:
        """Forget everything: graphs and counts too."""
        raise NotImplementedError

    @property
    def cur_timestep(self) -> int:
        """The step index: as set, else that of the newest call."""
        session = self._call_log.tracker.session
        if session.explicit is not None:
            return session.explicit
        return 0 if session.newest is None else session.newest.position.index

    @cur_timestep.setter
    def cur_timestep(self, step: int | None) -> None:
        if self._call_log.tracker.batch is not None:
            expected = "to be set in each session (with session: cached.cur_timestep = ...)"
            raise OptionError("cur_timestep", step, expected)
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise OptionError("cur_timestep", step, "a step index: an integer from 0, or None")
        self._call_log.tracker.session.explicit = step

    @property
    def num_steps(self) -> int | None:
        """How many steps a generation has, for schedules that go by it; None where not known.

        Set it before a generation begins. It goes before the option of this name.
        """
        given = self._call_log.count.given
        return self._call_log.num_steps if given is None else given

    @num_steps.setter
    def num_steps(self, number: int | None) -> None:
        if number is not None:
            check_num_steps(number)
        self._call_log.count.given = number

    @property
    def timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of a generation's calls; None where not known.

        Set them before a generation begins: a sequence, tensor or array, or a function that is
        asked at a generation's first call. They go before the option of this name.
        """
        given = self._call_log.count.given_timesteps
        if isinstance(given, tuple):
            return given
        course = self._call_log.course
        return None if course is None else course.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Timesteps | None) -> None:
        if timesteps is not None and not callable(timesteps):
            timesteps = checked_timesteps(timesteps)
        self._call_log.count.given_timesteps = timesteps

    def enable(self) -> None:
        """Cache from the next call on."""
        self._enabled = True

    def disable(self) -> None:
        """Be exactly the original model; nothing is held any more."""
        self._enabled = False
        self.clear_states()

    def new_session(self) -> Session:
        """A session for the calls of one request.

            session = cached.new_session()
            with session:  # again for each of the request's calls
                noise = cached(sample, timestep, prompt)
            session.close()

        It holds a generation and branches of its own, and is freed when it is closed or dropped.
        There may be any number. Without a session each thread has one.
        """
        return self._call_log.tracker.new_session()

    def batch(self, sessions: Sequence[Session], *, shared: Collection[str] = ()) -> Batch:
        """Calls within have a row (in dimension 0) for each session, in this order.

            with cached.batch([first, second]):
                noise = cached(torch.cat([a, b]), torch.tensor([900.0, 40.0]), prompts)

        The requests may stand at different steps: rows that compute run as one batch, rows that
        reuse as another, each with its own state. The outputs are in the caller's order. An
        argument has rows where its first dimension is the number of sessions (so has a list of as
        many items); `shared` names arguments that have none all the same.

        Raises `OptionError` for sessions that are not open, not of this model, or there twice.
        """
        return Batch(self._call_log.tracker.scope, sessions, shared)

    def cache_context(self, name: str, **more: Any) -> AbstractContextManager[None]:
        """Calls within belong to the CFG branch `name`, which has a state of its own.

        Contexts nest: a name inside of another is a branch of that one. They are context-local, as
        sessions are.

        `more`: what a pipeline tells beside the name; passed on to the model's own method, where
        there is one.
        """
        if not isinstance(name, str):
            raise OptionError("name", name, "the name of a branch, such as 'cond'")
        return CacheContext(self._call_log.tracker.scope, name, self._own_context(name, more))

    def _own_context(self, name: str, more: dict[str, Any]) -> AbstractContextManager[Any] | None:
        return None

    def cache_report(self) -> CacheReport:
        """What is cached, what it holds, what the last generation did."""
        return report(self._call_log, self._lowered(), self._enabled)

    def explain(self, full: bool = False) -> Explanation:
        """What was found in the model, what is held of it, and what a reused step still runs.

        To be printed. `full`: with the text of every graph.
        """
        return explain(self._call_log, self._lowered(), self._enabled, full)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """The last generation as a picture: what was done with each block on each step.

        For a rule of the strategy's own (TeaCache with `rel_l1_thresh`) also what it measured
        against its threshold. Written to `path` (PNG, PDF, SVG by its ending), if given.

        Raises `MissingPackageError` without matplotlib, `DitCacheError` before the first call.
        """
        return draw(self.cache_report(), path)
