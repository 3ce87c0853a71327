"""A run whose steps several models share, one after the other or all on every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.tracking.generation import Generation
from dit_cache_fx.runtime.tracking.timestep_value import number_of
from dit_cache_fx.strategies.timesteps import Timesteps, place_of


def share_run(logs: Sequence[CallLog], timesteps: Timesteps) -> None:
    """Let the models behind `logs` share the steps of each run, and its warnings.

    `timesteps`: of a run, one for each step. Timesteps that the user gave to a model take
    precedence.
    """
    warned: set[str] = set()
    for log in logs:
        count = log.count
        count.warned = warned
        count.began = partial(_began, [other for other in logs if other is not log])
        if log.strategy.timesteps is None:
            count.given_timesteps, count.exact = timesteps, True


def _began(others: Sequence[CallLog], timesteps: Sequence[float], at: int) -> int:
    """Return the index of the run's first timestep, for a model that begins at index `at`."""
    for other in others:
        newest = other.tracker.session.newest
        if newest is not None and _stands_before(newest, timesteps, at):
            steps = newest.position.index + 1
            newest.told = steps  # the run continued elsewhere: it has no more
            return max(at - steps - len(newest.course.before), 0)
    return at


def _stands_before(generation: Generation, timesteps: Sequence[float], at: int) -> bool:
    """Return whether the newest step of a generation is the one before the index `at`."""
    position = generation.position
    return (
        at > 0
        and not position.explicit
        and place_of(timesteps, number_of(position.value, timesteps)) == at - 1
    )
