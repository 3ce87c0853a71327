"""`LifeCycle`: the methods that cached models and backends share."""

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
from dit_cache_fx.runtime.tracking.scope import CacheContext
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.strategies.checks import check_count, check_num_steps
from dit_cache_fx.strategies.timesteps import Timesteps, given_timesteps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LifeCycle:
    """The methods that a cached model and a backend share."""

    _enabled: bool

    @property
    def _call_log(self) -> CallLog:
        raise NotImplementedError

    def _lowered(self) -> Sequence[Lowered]:
        """Return the graphs."""
        raise NotImplementedError

    def clear_states(self) -> None:
        """Forget the cached tensors and the place in the generation; keep the graphs."""
        self._call_log.tracker.clear()

    def reset_states(self) -> None:
        """Forget everything, including graphs and counts."""
        raise NotImplementedError

    @property
    def cur_timestep(self) -> int:
        """The index of the current step, from 0: as set, else that of the newest call.

        Set it to override the step that follows from the timestep; set None to undo that. Inside a
        session it belongs to the session.

        Raises:
            OptionError: The new value is neither an integer from 0 nor None.

        Example:
            >>> cached.cur_timestep = 0
            >>> noise = cached(sample, timestep, prompt)
            >>> cached.cur_timestep = None
        """
        session = self._call_log.tracker.session
        if session.explicit is not None:
            return session.explicit
        return 0 if session.newest is None else session.newest.position.index

    @cur_timestep.setter
    def cur_timestep(self, step: int | None) -> None:
        if self._call_log.tracker.batch is not None:
            expected = "None here: set it in each session (with session: cached.cur_timestep = ...)"
            raise OptionError("cur_timestep", step, expected)
        check_count("cur_timestep", step, 0, optional=True, meaning="a step index")
        self._call_log.tracker.session.explicit = step

    @property
    def num_steps(self) -> int | None:
        """The number of steps in a generation; None if unknown.

        Set it before a generation begins. It takes precedence over the option of this name; set
        None to undo that.

        Raises:
            OptionError: The new value is neither an integer from 1 nor None.

        Example:
            >>> cached.num_steps = 30
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
        """The timesteps of the calls of a generation; None if unknown.

        Set them before a generation begins: a flat sequence, tensor or array of finite numbers, in
        the unit of the scheduler or of the model, or a function that returns them and is called at
        the first call of each generation. They take precedence over the option of this name; set
        None to undo that.

        Raises:
            OptionError: The new value is no flat sequence of finite numbers.

        Example:
            >>> cached.timesteps = torch.linspace(1000.0, 20.0, 50)
            >>> cached.timesteps = lambda: pipe.scheduler.timesteps
        """
        given = self._call_log.count.given_timesteps
        if isinstance(given, tuple):
            return given
        course = self._call_log.course
        return None if course is None else course.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Timesteps | None) -> None:
        count = self._call_log.count
        count.given_timesteps, count.exact = given_timesteps(timesteps), False

    def enable(self) -> None:
        """Cache from the next call on."""
        self._enabled = True

    def disable(self) -> None:
        """Run exactly as the original model, and free the cached tensors."""
        self._enabled = False
        self.clear_states()

    def new_session(self) -> Session:
        """Return a session for the calls of one request.

        A session has its own generation and branches. Closing or dropping it frees them. The number
        of sessions is not limited. Calls outside of any session belong to one per thread.

        Example:
            >>> session = cached.new_session()
            >>> with session:  # again for each call of the request
            ...     noise = cached(sample, timestep, prompt)
            >>> session.close()
        """
        return self._call_log.tracker.new_session()

    def batch(self, sessions: Sequence[Session], *, shared: Collection[str] = ()) -> Batch:
        """Return a context whose calls have a row (in dimension 0) for each session, in this order.

        The requests may be at different steps. Rows that compute run as one batch, rows that reuse
        as another, each with its own state; the outputs are in the caller's order. An argument has
        rows if its first dimension is the number of sessions (or if it is a list of as many items).

        Args:
            sessions (`Sequence[Session]`):
                The session of each row, each one once.
            shared (`Collection[str]`, defaults to `()`):
                The names of arguments without rows whose first dimension happens to be the number
                of sessions.

        Raises:
            OptionError: A session is closed, belongs to another model, or is given twice.

        Example:
            >>> with cached.batch([cached.new_session(), cached.new_session()]):
            ...     samples, prompts = torch.cat([sample, sample]), torch.cat([prompt, prompt])
            ...     noise = cached(samples, torch.tensor([900.0, 40.0]), prompts)
        """
        return Batch(self._call_log.tracker.scope, sessions, shared)

    def cache_context(self, name: str, **more: Any) -> AbstractContextManager[None]:
        """Return a context whose calls belong to one branch of CFG, with its own state.

        Contexts nest: a name inside another one is a branch of that one. Like sessions, they are
        local to the thread or the asyncio task.

        Args:
            name (`str`):
                The name of the branch, such as "cond".
            more (`Any`):
                Other arguments of the pipeline. The model's own `cache_context` gets them, if it
                has one.

        Raises:
            OptionError: `name` is no string.

        Example:
            >>> with cached.cache_context("cond"):
            ...     noise = cached(sample, timestep, prompt)
        """
        if not isinstance(name, str):
            raise OptionError("name", name, "the name of a branch, such as 'cond'")
        return CacheContext(self._call_log.tracker.scope, name, self._own_context(name, more))

    def _own_context(self, name: str, more: dict[str, Any]) -> AbstractContextManager[Any] | None:
        return None

    def cache_report(self) -> CacheReport:
        """Return a report of the cached blocks, the held bytes, and the last generation's steps.

        Example:
            >>> print(cached.cache_report())
            taylorcache...
        """
        return report(self._call_log, self._lowered(), self._enabled)

    def explain(self, full: bool = False) -> Explanation:
        """Return an explanation to print: block lists, held values, and the graph of a reused step.

        Args:
            full (`bool`, defaults to `False`):
                Add the text of every graph.

        Example:
            >>> print(cached.explain())
            taylorcache: computes...
        """
        return explain(self._call_log, self._lowered(), self._enabled, full)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the last generation: the action of each block on each step.

        For a strategy with a rule of its own, such as TeaCache with `rel_l1_thresh`, the figure
        also shows the measured numbers and the threshold. Requires matplotlib.

        Args:
            path (`str | PathLike[str]`, *optional*):
                The file to write; its ending (`.png`, `.pdf`, `.svg`) selects the format. When
                None, nothing is written.

        Returns:
            The figure.

        Raises:
            MissingPackageError: Matplotlib is not installed.
            DitCacheError: There was no call yet.

        Example:
            >>> figure = cached.plot("steps.png")
        """
        return draw(self.cache_report(), path)
