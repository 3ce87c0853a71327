"""Sessions: the calls of one request, kept apart from all others by the user's word."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import nullcontext, suppress
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import OptionError
from tests.toys import TOY, Block, ByHand, ToyDiT, generation, make, toy_inputs

#: computed steps of a generation of six
STEPS = {0, 2, 3}
MODES = ("eager", "compiled", "compile_steps", "backend")


pytestmark = pytest.mark.usefixtures("no_grad")


def pair(mode: str, fullgraph: bool = True) -> tuple[Any, Any, ByHand]:
    """What is called, what has the life cycle, and DeepCache done by hand."""
    torch._dynamo.reset()
    model = make(ToyDiT)
    by_hand = ByHand(model, ["blocks"])
    if mode == "backend":
        cache = dit_cache_fx.backend("deepcache", no_cache_steps=STEPS, inner="eager")
        return torch.compile(model, backend=cache), cache, by_hand
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    if mode == "compile_steps":
        cached.compile_steps(backend="eager")
    if mode == "compiled":
        return torch.compile(cached, backend="eager", fullgraph=fullgraph), cached, by_hand
    return cached, cached, by_hand


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", ["one prompt", "prompts of their own"])
@pytest.mark.parametrize("offset", [0, 2])
def test_requests_in_turn_get_what_they_get_alone(mode: str, prompt: str, offset: int) -> None:
    """One call of each request at a time; the second one starts later."""
    called, cache, by_hand = pair(mode)
    shared = toy_inputs(0.0)["text"]
    requests = [generation(TOY, STEPS, prompt=number) for number in range(3)]
    sessions = [cache.new_session() for _ in requests]
    for tick in range(6 + 2 * offset):
        for number, (calls, session) in enumerate(zip(requests, sessions, strict=True)):
            step = tick - offset * number
            if not 0 <= step < 6:
                continue
            computes, inputs = calls[step]
            x = toy_inputs(0.0, seed=10 * number + step)["x"]
            inputs = inputs | {"x": x}
            inputs = inputs | {"text": shared} if prompt == "one prompt" else inputs
            with session:
                got = called(**inputs)
            assert torch.equal(got, by_hand(computes, branch=number, **inputs)), (number, step)
    assert (cache.cache_report().calls_computed, cache.cache_report().calls_reused) == (9, 9)


def test_branches_within_a_session_are_told_apart() -> None:
    called, cache, by_hand = pair("eager")
    sessions = [cache.new_session() for _ in range(2)]
    for index, t in enumerate(TOY.timesteps(6)):
        for request, session in enumerate(sessions):
            for branch, name in enumerate(("cond", "uncond")):
                inputs = toy_inputs(t, seed=index, prompt=branch)
                with session, cache.cache_context(name) if request else nullcontext():
                    got = called(**inputs)
                assert torch.equal(got, by_hand(index in STEPS, branch=(request, branch), **inputs))


def test_ten_thousand_sessions_do_not_grow() -> None:
    _, cache, _ = pair("eager")
    inputs = toy_inputs(1000.0)
    cache(**inputs)
    for number in range(10_000):
        session = cache.new_session()
        if number % 100 == 0:
            with session:
                cache(**inputs)
        if number % 2:
            session.close()
    del session
    gc.collect()
    assert len(cache._engine.call_log.tracker.sessions()) == 1


def test_what_a_session_holds_is_freed_when_it_is_closed_or_dropped() -> None:
    _, cache, _ = pair("eager")
    held = []
    for close in (True, False):
        session = cache.new_session()
        with session:
            cache(**toy_inputs(1000.0))
        assert session.bytes_held == cache.cache_report().bytes_held > 0
        (branch,) = session.branches
        held.append(ref(branch.cached[0].tensor))
        del branch
        if close:
            session.close()
        del session  # without a collection: nothing refers to itself
        assert held[-1]() is None
    assert cache.cache_report().bytes_held == 0


def test_a_closed_session_cannot_be_entered() -> None:
    _, cache, _ = pair("eager")
    session = cache.new_session()
    session.close()
    with pytest.raises(OptionError, match=r"session='closed': a new one: cached.new_session\(\)"):
        session.__enter__()


class _MeetingBlock(Block):
    """Notes whether another thread's call is in it at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["meeting"] = threading.Barrier(2)
        self.__dict__["patience"] = 0.0
        self.__dict__["met"] = []

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        with suppress(threading.BrokenBarrierError):
            self.__dict__["meeting"].wait(self.__dict__["patience"])
            self.__dict__["met"].append(True)
        return super().forward(h, c)


class _MeetingDiT(ToyDiT):
    def block(self) -> nn.Module:
        return _MeetingBlock()


@pytest.mark.parametrize("shared", [True, False])
def test_threads_in_one_session_take_turns(shared: bool) -> None:
    """Calls of two sessions run at a time, those of one session do not."""
    model = make(_MeetingDiT, depth=1)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(6), check=False)
    cached(**toy_inputs(900.0))
    sessions = [cached.new_session()] * 2 if shared else [cached.new_session() for _ in range(2)]

    def call(session: Any, prompt: int) -> None:
        with torch.no_grad(), session:
            cached(**toy_inputs(900.0, prompt=prompt))

    (block,) = model.blocks
    block.__dict__["meeting"].reset()
    block.__dict__["patience"] = 0.5 if shared else 60.0
    threads = [threading.Thread(target=call, args=(s, i)) for i, s in enumerate(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool(block.__dict__["met"]) is not shared


def test_sessions_nest_and_end_with_an_exception() -> None:
    _, cache, by_hand = pair("eager")
    outer, inner = cache.new_session(), cache.new_session()
    first, second = (inputs for _, inputs in generation(TOY, STEPS, steps=2))

    def call(name: str, inputs: dict[str, Any], computes: bool) -> None:
        assert torch.equal(cache(**inputs), by_hand(computes, branch=name, **inputs))

    with outer:
        call("outer", first, True)
        with suppress(ZeroDivisionError), inner:
            call("inner", first, True)
            raise ZeroDivisionError
        call("outer", second, False)
    with inner:
        call("inner", second, False)
    call("none", first, True)


def test_the_explicit_step_index_is_the_sessions_own() -> None:
    _, cache, _ = pair("eager")
    session = cache.new_session()
    with session:
        cache.cur_timestep = 4
        assert cache.cur_timestep == 4
    assert cache.cur_timestep == 0


def test_clear_states_forgets_all_sessions() -> None:
    _, cache, _ = pair("eager")
    sessions = [cache.new_session() for _ in range(3)]
    for session in sessions:
        with session:
            cache(**toy_inputs(1000.0))
    cache.clear_states()
    assert [s.bytes_held for s in sessions] == [0, 0, 0]
    with sessions[0]:
        cache(**toy_inputs(900.0))
    assert cache.cache_report().calls_computed == 4


def test_asyncio_tasks_do_not_see_each_others_session() -> None:
    _, cache, by_hand = pair("eager")

    async def request(number: int) -> None:
        session = cache.new_session()
        for step, (computes, inputs) in enumerate(generation(TOY, STEPS)):
            x = toy_inputs(0.0, seed=10 * number + step)["x"]
            with session, cache.cache_context("cond"):
                await asyncio.sleep(0)  # the other task runs in between, inside of its own session
                got = cache(**(inputs | {"x": x}))
            want = by_hand(computes, branch=number, **(inputs | {"x": x}))
            assert torch.equal(got, want), (number, step)

    async def both() -> None:
        await asyncio.gather(request(0), request(1))

    asyncio.run(both())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own", [True, False], ids=["sessions", "no sessions"])
def test_threads_share_a_model_and_nothing_else(own: bool, mode: str) -> None:
    """With one prompt and one context name: a thread without a session has its own."""
    called, cache, by_hand = pair(mode, fullgraph=False)
    turn, failures = threading.Barrier(3), []
    inputs = [generation(TOY, STEPS) for _ in range(3)]
    wanted = [
        [
            by_hand(computes, branch=n, **(given | {"x": toy_inputs(0.0, seed=10 * n + step)["x"]}))
            for step, (computes, given) in enumerate(inputs[n])
        ]
        for n in range(3)
    ]

    def request(number: int) -> None:
        session = cache.new_session() if own else nullcontext()
        for step, (_, given) in enumerate(inputs[number]):
            x = toy_inputs(0.0, seed=10 * number + step)["x"]
            turn.wait(30)
            with torch.no_grad(), session, cache.cache_context("cond"):
                got = called(**(given | {"x": x}))
            if not torch.equal(got, wanted[number][step]):
                failures.append((number, step))

    threads = [threading.Thread(target=request, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_threads_state_goes_with_the_thread() -> None:
    _, cache, _ = pair("eager")

    def request() -> None:
        with torch.no_grad():
            cache(**toy_inputs(1000.0))

    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    gc.collect()
    assert cache.cache_report().bytes_held == 0


def test_nested_contexts_are_branches_of_their_own() -> None:
    """A request's name around a pipeline's own "cond": requests in turn stay apart."""
    _, cache, by_hand = pair("eager")
    calls = generation(TOY, STEPS)
    for step, (computes, inputs) in enumerate(calls):
        for request in ("a", "b"):
            x = toy_inputs(0.0, seed=step + 100 * (request == "b"))["x"]
            given = inputs | {"x": x}
            with cache.cache_context(request), cache.cache_context("cond"):
                got = cache(**given)
            assert torch.equal(got, by_hand(computes, branch=request, **given))
    assert {r.context for r in cache.cache_report().timeline} <= {"a/cond", "b/cond"}
