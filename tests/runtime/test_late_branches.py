"""A branch that a request's first steps did not have is of its generation, whoever calls between.

Guidance that starts or ends behind the first step makes calls of another batch: a signature that
was not there before, whose sample cannot be compared with the one before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.toys import ToyDiT, make, toy_inputs

pytestmark = pytest.mark.usefixtures("no_grad")


def cache(computed: Any = (0, 3, 6)) -> CachedModel:
    return dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=computed)


def call(cached: CachedModel, step: float, batch: int, prompt: int = 0) -> str:
    """A step of a request, its conditioning made anew; what it did."""
    cached(**toy_inputs(1000.0 - 100 * step, seed=prompt, prompt=prompt, batch=batch))
    record = cached.cache_report().timeline[-1]
    return f"{record.step}{record.action[0]}"


@pytest.mark.parametrize("batches", [(2, 1, 1, 1, 1), (1, 2, 2, 2, 2)], ids=["ends", "starts"])
def test_guidance_behind_the_first_step_of_a_session(batches: tuple[int, ...]) -> None:
    cached = cache()
    with cached.new_session():
        done = [call(cached, step, batch) for step, batch in enumerate(batches)]
    assert done == ["0c", "1c", "2r", "3c", "4r"]


def within(cached: CachedModel, *names: str) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for name in names:
        stack.enter_context(cached.cache_context(name))
    return stack


def test_guidance_behind_the_first_step_of_requests_told_by_contexts() -> None:
    """In turn, so that the newest generation is always another request's."""
    cached = cache()
    done: dict[int, list[str]] = {0: [], 1: []}
    for step, batch in enumerate((2, 1, 1, 1, 2)):
        for request in done:
            with within(cached, f"request {request}", "guided" if batch == 2 else "alone"):
                done[request].append(call(cached, step + 0.3 * request, batch, request))
    assert done[0] == done[1] == ["0c", "1c", "2r", "3c", "4c"]


def test_another_request_of_a_thread_is_none() -> None:
    """Without a session, and with nothing that it shares with the calls before."""
    cached = cache()
    done = [call(cached, 0, batch=2, prompt=1), call(cached, 1, batch=1, prompt=2)]
    assert done == ["0c", "0c"]
