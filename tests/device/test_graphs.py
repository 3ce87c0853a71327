"""Graphs of each kind of step with branches and sessions, three generations: nothing overwritten.

On the GPU each is a CUDA graph, whose replay writes into the same memory again. On the CPU the same
calls go through another compiler: what is held and given out is checked in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from tests.compile.compiling import RULE, SCHEDULED
from tests.device.places import each_device, on
from tests.toys import ToyDiT, make, toy_inputs

STEPS, GENERATIONS = 6, 3
BRANCHES = ("cond", "uncond")

each_strategy = pytest.mark.parametrize(
    ("strategy", "options"), [*SCHEDULED.values(), RULE], ids=[*SCHEDULED, "rule"]
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiler_of(device: str) -> dict[str, Any]:
    return {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}


def request_of(number: int, device: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The calls of one request: both branches of each step, conditioning of the same tensors."""
    texts = {
        name: on(device, toy_inputs(0.0, prompt=2 * number + i)["text"])
        for i, name in enumerate(BRANCHES)
    }
    for step in range(STEPS):
        inputs = on(device, toy_inputs(1000.0 - 150 * step, seed=10 * number + step))
        for name, text in texts.items():
            yield name, {**inputs, "text": text}


def alone(number: int) -> AbstractContextManager[Any]:
    """Without a session of its own."""
    return nullcontext()


def run(
    cached: Any, requests: int, device: str, session: Callable[[int], AbstractContextManager[Any]]
) -> list[Tensor]:
    """The outputs of requests that come in turn, call by call; none is looked at before the end."""
    outputs = []
    calls = [list(request_of(number, device)) for number in range(requests)]
    with torch.no_grad():
        for turn in zip(*calls, strict=True):
            for number, (name, inputs) in enumerate(turn):
                with session(number), cached.cache_context(name):
                    outputs.append(cached(**inputs))
    return outputs


@each_device
@each_strategy
def test_branches_of_one_request(device: str, strategy: str, options: dict[str, Any]) -> None:
    model = make(ToyDiT).to(device)
    eager, cached = (dit_cache_fx.apply(model, strategy, **options) for _ in range(2))
    cached.compile_steps(**compiler_of(device))
    got, want = [], []
    for _ in range(GENERATIONS):
        for outputs, of in ((got, cached), (want, eager)):
            outputs += run(of, 1, device, alone)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert cached.cache_report().calls_reused == eager.cache_report().calls_reused > 0


@each_device
@each_strategy
def test_sessions_in_turn(device: str, strategy: str, options: dict[str, Any]) -> None:
    model = make(ToyDiT).to(device)
    eager, cached = (dit_cache_fx.apply(model, strategy, **options) for _ in range(2))
    cached.compile_steps(**compiler_of(device))
    for _ in range(GENERATIONS):
        both = []
        for of in (cached, eager):
            sessions = [of.new_session() for _ in range(3)]
            both.append(run(of, 3, device, sessions.__getitem__))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert cached.cache_report().calls_reused == eager.cache_report().calls_reused > 0


@each_device
def test_what_the_caller_keeps_and_changes_is_its_own(device: str) -> None:
    """The outputs of one generation are as they were after the next one, and may be changed."""
    model = make(ToyDiT).to(device)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 3})
    cached.compile_steps(**compiler_of(device))
    first = run(cached, 1, device, alone)
    kept = [output.clone() for output in first]
    again = run(cached, 1, device, alone)
    for output, copy in zip(first, kept, strict=True):
        assert torch.equal(output, copy)
        output.zero_()
    for output, copy in zip(run(cached, 1, device, alone), again, strict=True):
        torch.testing.assert_close(output, copy, rtol=1e-3, atol=1e-3)
