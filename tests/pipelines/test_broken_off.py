"""Generations that end early: what they held is never used by the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from tests.pipelines.blocks import blocks_of, replaced_forwards
from tests.pipelines.families import FAMILIES, Family, marked
from tests.pipelines.families.flux import FLUX_IMAGE_TO_IMAGE
from tests.pipelines.session import Session, session_of

#: image-to-image has Flux's own transformer
OTHERS = [family for family in FAMILIES if family is not FLUX_IMAGE_TO_IMAGE]
each_family = pytest.mark.parametrize("family", marked(OTHERS))


class Broken(Exception):
    """Raised by a test in the middle of a generation."""


@contextmanager
def failing_block(session: Session, call: int) -> Iterator[None]:
    """The last block raises in its call of this number, counted from 0."""
    calls = 0

    def failing(forward: Any) -> Any:
        def block(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Broken
            return forward(*args, **kwargs)

        return block

    with replaced_forwards(blocks_of(session.model, session.family.blocks)[-1:], failing):
        yield


@contextmanager
def failing_scheduler(session: Session, call: int) -> Iterator[None]:
    """The sampler raises in its step of this number."""
    scheduler, calls = session.pipe.scheduler, 0
    own = scheduler.step

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            raise Broken
        return own(*args, **kwargs)

    scheduler.step = failing
    try:
        yield
    finally:
        del scheduler.step


@each_family
def test_a_generation_that_an_exception_ended_leaves_nothing_stale(family: Family) -> None:
    """The next one has the same prompt, by the very same tensors, or another one."""
    session, prompt = session_of(family), family.arguments()
    last = family.passes - 1  # the last branch of the first step
    for failure in (failing_block(session, last), failing_scheduler(session, 0)):
        with failure, pytest.raises(Broken):
            session.cache(seed=7, **prompt)
        session.check_nothing_stale("same prompt", **prompt)
    with failing_block(session, last + family.passes), pytest.raises(Broken):
        session.cache(seed=7, **prompt)
    session.check("another prompt", prompt=1)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", marked(f for f in OTHERS if f.callback and f.interrupts))
def test_an_interrupted_generation_leaves_nothing_stale(family: Family, guided: bool) -> None:
    session, prompt = session_of(family), family.arguments()
    for last in (0, 1):

        def interrupt(pipe: Any, step: int, timestep: Tensor, given: Any) -> dict[str, Any]:
            pipe._interrupt = step >= last  # noqa: B023
            return {}

        with session.counts() as count:
            session.cache(seed=7, guided=guided, callback_on_step_end=interrupt, **prompt)
        assert count.calls == session.passes(guided) * session.depth
        session.check_nothing_stale(("interrupted after step", last), guided=guided, **prompt)
