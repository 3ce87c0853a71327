"""A run whose steps several models share, one behind the other or each on every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.generation import Generation
from dit_cache_fx.runtime.timestep_value import number_of
from dit_cache_fx.strategies.timesteps import Timesteps, place_of


def share_run(hosts: Sequence[CallLog], timesteps: Timesteps) -> None:
    """Let the models behind `hosts` share the steps of each run, and its warnings.

    `timesteps`: of a run, one for each step. They do not take the place of those that the user has
    given to a model.
    """
    warned: set[str] = set()
    for host in hosts:
        count = host.count
        count.warned = warned
        count.began = partial(_began, [other for other in hosts if other is not host])
        if host.strategy.timesteps is None:
            count.given_timesteps, count.exact = timesteps, True


def _began(others: Sequence[CallLog], timesteps: Sequence[float], at: int) -> int:
    """The index of the timestep that the run began with, whose model begins at index `at`."""
    for other in others:
        newest = other.tracker.session.newest
        if newest is not None and _stands_before(newest, timesteps, at):
            steps = newest.position.index + 1
            newest.told = steps  # the run has gone on elsewhere: it has no more
            return max(at - steps - len(newest.course.before), 0)
    return at


def _stands_before(generation: Generation, timesteps: Sequence[float], at: int) -> bool:
    """Whether the newest step of a generation is the one before the index `at`."""
    position = generation.position
    return (
        at > 0
        and not position.explicit
        and place_of(timesteps, number_of(position.value, timesteps)) == at - 1
    )
