"""Forwards that other tools have put on a model: called as they can be called, bit by bit."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx.capture.callable import called_as
from tests.toys import TOY, ByHand, ToyDiT, actions, generation, make

STEPS = {0, 2, 3}


pytestmark = pytest.mark.usefixtures("no_grad")


def partial_of_a_wrapper(model: Any) -> None:
    original = type(model).forward

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(wrapper, model), wrapper)


def partial_that_wraps_the_bound(model: Any) -> None:
    """As accelerate's hooks do."""
    original = model.forward

    def wrapper(module: Any, *args: Any, **kwargs: Any) -> Any:
        assert module is model
        return original(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(wrapper, model), original)


def partial_that_wraps_the_unbound(model: Any) -> None:
    original = type(model).forward

    def wrapper(module: Any, *args: Any, **kwargs: Any) -> Any:
        return original(module, *args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(wrapper, model), original)


def bound_wrapper_of_the_bound(model: Any) -> None:
    original = model.forward

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = wrapper.__get__(model)


def function_that_wraps_the_bound(model: Any) -> None:
    original = model.forward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = wrapper


def function_that_wraps_the_unbound(model: Any) -> None:
    original = type(model).forward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(model, *args, **kwargs)

    model.forward = wrapper


def twice(model: Any) -> None:
    bound_wrapper_of_the_bound(model)
    partial_that_wraps_the_bound(model)
    function_that_wraps_the_bound(model)


def method_of_a_function(model: Any) -> None:
    def forward(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return type(self).forward(self, x, timestep, text)

    model.forward = types.MethodType(forward, model)


def function_of_anything(model: Any) -> None:
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)


def looks_at_places(model: Any) -> None:
    """Wants to be called as the caller calls it."""
    original = model.forward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * (2.0 if args else 1.0)

    model.forward = wrapper


def class_forward_of_anything(model: Any) -> None:
    original = type(model).forward
    kind = type("Sub", (type(model),), {"forward": lambda self, *a, **k: original(self, *a, **k)})
    model.__class__ = kind


def decorated_class_forward(model: Any) -> None:
    original = type(model).forward

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    model.__class__ = type("Sub", (type(model),), {"forward": wrapper})


def wrapper_with_more(model: Any) -> None:
    original = model.forward

    @functools.wraps(original)
    def wrapper(*args: Any, gain: float = 2.0, **kwargs: Any) -> Any:
        return gain * original(*args, **kwargs)

    model.forward = wrapper


WAYS: list[Callable[[Any], None]] = [
    partial_of_a_wrapper,
    partial_that_wraps_the_bound,
    partial_that_wraps_the_unbound,
    bound_wrapper_of_the_bound,
    function_that_wraps_the_bound,
    function_that_wraps_the_unbound,
    twice,
    method_of_a_function,
    function_of_anything,
    looks_at_places,
    class_forward_of_anything,
    decorated_class_forward,
    wrapper_with_more,
]


@pytest.mark.parametrize("places", [0, 1, 3], ids=["keywords", "mixed", "positional"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_each_way_to_put_a_forward_on_a_model(way: Callable[[Any], None], places: int) -> None:
    model, plain = make(ToyDiT), make(ToyDiT)
    way(model)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    by_hand = ByHand(plain, ["blocks"])
    gain = 2.0 if way is wrapper_with_more or (way is looks_at_places and places) else 1.0
    for computes, inputs in generation(TOY, STEPS):
        values = list(inputs.items())
        got = cached(*(v for _, v in values[:places]), **dict(values[places:]))
        assert torch.equal(got, gain * by_hand(computes, **inputs))
    assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_the_parameters_are_those_that_it_can_be_called_with(way: Callable[[Any], None]) -> None:
    model: Any = make(ToyDiT)
    way(model)
    names = [
        name
        for name, p in called_as(model.forward).parameters.items()
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    known = [] if way in (function_of_anything, class_forward_of_anything) else [*TOY_NAMES]
    assert names == known + (["gain"] if way is wrapper_with_more else [])


TOY_NAMES = ("x", "timestep", "text")


def test_a_keyword_of_the_wrappers_own() -> None:
    model, plain = make(ToyDiT), make(ToyDiT)
    wrapper_with_more(model)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    for computes, inputs in generation(TOY, STEPS):
        assert torch.equal(cached(**inputs, gain=3.0), 3.0 * plain(**inputs)) == computes


class NamelessDiT(nn.Module):
    """Nobody says what its arguments are called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make(ToyDiT)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_arguments_without_names_are_told_by_their_form() -> None:
    model = NamelessDiT().eval()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    by_hand = ByHand(model.inner, ["blocks"])
    for computes, inputs in generation(TOY, STEPS):
        assert torch.equal(cached(*inputs.values()), by_hand(computes, **inputs))
    assert actions(cached) == "CrCCrr"
    assert "args_1" in str(cached.explain())


def test_where_the_form_does_not_tell_the_error_says_what_to_do() -> None:
    class TwoTimes(NamelessDiT):
        def forward(self, x: Tensor, *args: Any) -> Any:
            return self.inner(x * args[1][:, None, None], args[0], args[2])

    cached = dit_cache_fx.apply(TwoTimes().eval(), "deepcache", no_cache_steps=STEPS)
    _, inputs = generation(TOY, STEPS)[0]
    given = (inputs["x"], inputs["timestep"], torch.ones(1), inputs["text"])
    told = r"those of its form are \['args_0', 'args_1'\]. Name it: timestep="
    with pytest.raises(dit_cache_fx.DiscoveryError, match=told):
        cached(*given)
    cached = dit_cache_fx.apply(
        TwoTimes().eval(), "deepcache", no_cache_steps=STEPS, timestep="args_0"
    )
    assert torch.equal(cached(*given), cached._model(*given))
