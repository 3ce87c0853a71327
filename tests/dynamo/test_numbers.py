"""`backend()` and what is no tensor input: timesteps that are numbers, and constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import Backend, DitCacheWarning
from tests.dynamo.test_backend import STEPS, actions, warned
from tests.toys import DIM, Block, ByHand, ToyDiT, make, toy_inputs


class NumberedDiT(ToyDiT):
    """Takes the timestep as a number, and makes it a tensor in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, timestep: float, text: Tensor) -> Any:  # type: ignore[override]
        made: dict[str, Callable[[], Tensor]] = {
            "full": lambda: torch.full((1,), timestep),
            "tensor": lambda: torch.tensor([timestep]),
            "times": lambda: timestep * torch.ones(1),
        }
        return super().forward(x, made[self.way](), text)


def cache_of(inner: str = "eager", **options: Any) -> Backend:
    return dit_cache_fx.backend("deepcache", inner=inner, no_cache_steps=STEPS, **options)


def generation(number: type, prompt: int = 0) -> list[dict[str, Any]]:
    times = [number(time) for time in (60, 50, 40, 30, 20, 10)]
    calls = [toy_inputs(0.0, seed=step, prompt=prompt) for step in range(6)]
    return [{**call, "timestep": time} for call, time in zip(calls, times, strict=True)]


@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize("way", ["full", "tensor", "times"])
def test_a_timestep_that_is_a_number(
    way: str, number: type, recwarn: pytest.WarningsRecorder
) -> None:
    """Its first value is a constant of a graph, then it varies: one generation over two graphs."""
    cache = cache_of()
    model = torch.compile(make(NumberedDiT, way=way), backend=cache)
    for prompt in range(2):
        by_hand = ByHand(make(NumberedDiT, way=way), ["blocks"])
        for step, inputs in enumerate(generation(number, prompt)):
            assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs)), step
        assert actions(cache) == "CCrrCr"
    assert len(cache.cache_report().captures) == 2
    assert not [w for w in recwarn if issubclass(w.category, DitCacheWarning)]


def test_sessions_in_turn_go_on_over_both_graphs() -> None:
    cache = cache_of()
    model = torch.compile(make(NumberedDiT, way="full"), backend=cache)
    sessions = [cache.new_session() for _ in range(2)]
    by_hand = [ByHand(make(NumberedDiT, way="full"), ["blocks"]) for _ in sessions]
    calls = [generation(float, prompt) for prompt in range(2)]
    for step in range(6):
        for session, hand, mine in zip(sessions, by_hand, calls, strict=True):
            with session:
                got = model(**mine[step])
            assert torch.equal(got, hand(step in STEPS, **mine[step])), step
    assert actions(cache) == "CCrrCr"


@pytest.mark.parametrize("number", [int, float])
def test_disabled_a_number_is_one(number: type) -> None:
    inside, cache = make(NumberedDiT, way="times"), cache_of()
    model = torch.compile(inside, backend=cache)
    cache.disable()
    for inputs in generation(number)[:3]:
        assert torch.equal(model(**inputs), inside(**inputs))


def test_numbers_that_must_stay_constants_are_named() -> None:
    inside = make(NumberedDiT, way="full")
    model = torch.compile(inside, backend=cache_of(), dynamic=False)

    def steps() -> None:
        for inputs in generation(int)[:3]:
            assert torch.equal(model(**inputs), inside(**inputs))

    warned(steps, "no tensor input .* Pass it as a tensor")


class ScaledDiT(NumberedDiT):
    """Takes another number, which is a constant too."""

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: float, text: Tensor, scale: float = 1.0
    ) -> Any:
        return super().forward(x * scale, timestep / 7, text)


@pytest.mark.parametrize("way", ["full", "tensor", "times"])
def test_numbers_that_must_stay_constants_with_the_index_set(way: str) -> None:
    """Each step has a graph of its own, and what one holds is right for the next."""
    cache = cache_of()
    model = torch.compile(make(ScaledDiT, way=way), backend=cache, dynamic=False)
    by_hand = ByHand(make(ScaledDiT, way=way), ["blocks"])
    for step, inputs in enumerate(generation(int)):
        cache.cur_timestep = step
        assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs)), step
    assert actions(cache) == "CCrrCr"


def test_what_is_held_with_another_constant_is_not_used() -> None:
    cache = cache_of()
    model = torch.compile(make(ScaledDiT, way="full"), backend=cache, dynamic=False)
    inside = make(ScaledDiT, way="full")
    for step, inputs in enumerate(generation(int)[:3]):
        cache.cur_timestep = step
        for scale in (1.0, 2.0):
            assert torch.equal(model(**inputs, scale=scale), inside(**inputs, scale=scale))
    assert set(actions(cache)) == {"C"}


class OwnTimeDiT(ToyDiT):
    """Makes the timestep inside."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, torch.full((1,), 0.5), text)


def test_a_timestep_that_is_made_inside_with_the_index_set() -> None:
    cache = cache_of()
    model = torch.compile(make(OwnTimeDiT), backend=cache, fullgraph=True)
    by_hand = ByHand(make(OwnTimeDiT), ["blocks"])
    for step in range(6):
        cache.cur_timestep = step
        inputs = toy_inputs(0.0, seed=step)
        del inputs["timestep"]
        assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs))
    assert actions(cache) == "CCrrCr"


# --- tensors that the graph holds -------------------------------------------------------------


class ShiftedBlock(Block):
    """With a tensor that its code makes of numbers."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h + torch.tensor([0.1 * i for i in range(DIM)]), c)


class ShiftedDiT(ToyDiT):
    """Two of them around the blocks, and a value read out of such a tensor."""

    def block(self) -> Any:
        return ShiftedBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        text = text * torch.tensor([1.0 + i for i in range(DIM)])
        x = x - torch.tensor([0.2 * i for i in range(DIM)])
        scale = torch.sqrt(torch.tensor(4.0, dtype=torch.float64))
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=scale)  # type: ignore[arg-type]
        return super().forward(x, timestep, text)


def _compare(cache: Backend, **close: float) -> None:
    model = torch.compile(make(ShiftedDiT), backend=cache, fullgraph=True)
    by_hand = ByHand(make(ShiftedDiT), ["blocks"])
    for step, time in enumerate((1.0, 0.9, 0.8, 0.7, 0.6, 0.5)):
        inputs = toy_inputs(time, seed=step)
        want = by_hand(step in STEPS, **inputs)
        torch.testing.assert_close(model(**inputs), want, **close)
    assert actions(cache) == "CCrrCr"


def test_tensors_that_the_graph_holds() -> None:
    _compare(cache_of("aot_eager"), rtol=0.0, atol=0.0)


@pytest.mark.slow
def test_tensors_that_the_graph_holds_with_inductor() -> None:
    _compare(cache_of("inductor"), rtol=1e-4, atol=1e-4)
