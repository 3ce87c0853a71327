"""Timesteps that are numbers of Python's or numpy's, however the model makes tensors of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CaptureError
from tests.toys import TOY, ByHand, ToyDiT, actions, generation, make, toy_inputs

STEPS = {0, 2, 3}

NUMBERS: dict[str, Callable[[int], Any]] = {
    "float": float,
    "int": int,
    "np.float64": np.float64,
    "np.float32": np.float32,
    "np.float16": np.float16,
    "np.int64": np.int64,
    "np.int32": np.int32,
}
USES: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda t: torch.tensor(t).reshape(1),
    "tensor of a list": lambda t: torch.tensor([t]),
    "nested": lambda t: torch.tensor([[t, t]])[0, :1],
    "tensor, keywords": lambda t: torch.tensor(data=[t], dtype=torch.float32),
    "as_tensor": lambda t: torch.as_tensor(t).reshape(1),
    "as_tensor of a list": lambda t: torch.as_tensor([t], dtype=torch.float32),
    "asarray": lambda t: torch.asarray([t]),
    "scalar_tensor": lambda t: torch.scalar_tensor(t).reshape(1),
    "full": lambda t: torch.full((1,), t),
    "full, keywords": lambda t: torch.full(size=(1,), fill_value=t, dtype=torch.float32),
    "full, half": lambda t: torch.full([1], fill_value=t, dtype=torch.float16),
    "full_like": lambda t: torch.full_like(torch.ones(1), t),
    "new_full": lambda t: torch.ones(1).new_full((1,), t),
    "new_full, keywords": lambda t: torch.ones(1).new_full(size=[1], fill_value=t),
    "new_tensor": lambda t: torch.ones(1).new_tensor([t]),
    "fill_": lambda t: torch.empty(1).fill_(t),
    "arithmetic": lambda t: torch.ones(1) * t,
    "division": lambda t: torch.ones(1) * (t / 1000.0) * 1000,
}


pytestmark = pytest.mark.usefixtures("no_grad")


class NumberDiT(ToyDiT):
    def __init__(self, use: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.__dict__["use"] = use

    def forward(self, x: Tensor, timestep: Any, text: Tensor) -> Any:
        return super().forward(x, self.__dict__["use"](timestep), text)


def check(use: Callable[[Any], Tensor], number: Callable[[int], Any]) -> None:
    model = make(NumberDiT, use=use)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    by_hand = ByHand(model, ["blocks"])
    for step, (computes, inputs) in enumerate(generation(TOY, STEPS)):
        given = inputs | {"timestep": number(950 - 100 * step)}
        got, want = cached(**given), by_hand(computes, **given)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 1


@pytest.mark.parametrize("number", ["float", "np.float32"])
@pytest.mark.parametrize("use", USES)
def test_a_number_becomes_a_tensor_in_any_way(use: str, number: str) -> None:
    check(USES[use], NUMBERS[number])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("use", ["tensor of a list", "new_full"])
def test_a_number_of_any_kind(use: str, number: str) -> None:
    check(USES[use], NUMBERS[number])


def test_a_number_keeps_its_digits() -> None:
    """One third of a thousand is no float32."""
    for use in ("tensor of a list", "division"):
        check(USES[use], lambda value: value / 3)
    check(lambda t: torch.tensor([t], dtype=torch.float64) * 1e9 % 7, lambda value: value / 3)


def test_an_array_of_one() -> None:
    check(
        lambda t: torch.as_tensor(t, dtype=torch.float32), lambda v: np.array([v], dtype=np.float64)
    )
    check(lambda t: torch.tensor(t), lambda v: np.array([v], dtype=np.float32))


HOST: dict[str, Callable[[Any], Tensor]] = {
    "math.log": lambda t: torch.full((1,), math.log(t)),
    "float": lambda t: torch.tensor([float(t) / 1000]),
    "int": lambda t: torch.ones(1) * (int(t) // 3),
    "a look-up": lambda t: torch.ones(1) * {950 - 100 * i: 1.0 + i for i in range(9)}[int(t)],
}


@pytest.mark.parametrize("use", HOST)
def test_a_computation_on_the_host_is_refused_at_once(use: str) -> None:
    cached = dit_cache_fx.apply(
        make(NumberDiT, use=HOST[use]), "deepcache", no_cache_steps=STEPS, check=False
    )
    told = r"computes with the value of the timestep 'timestep' outside of torch.*as a tensor"
    with pytest.raises(CaptureError, match=told):
        cached(**(toy_inputs(1.0) | {"timestep": 950.0}))
    assert cached.cache_report().captures == ()


def test_a_question_about_a_number_is_a_guard() -> None:
    """Two answers, two graphs."""
    use = lambda t: torch.ones(1) * t * (2.0 if t > 700 else 1.0)  # noqa: E731
    model = make(NumberDiT, use=use)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(6))
    for step, (_, inputs) in enumerate(generation(TOY, STEPS)):
        given = inputs | {"timestep": 950.0 - 100 * step}
        assert torch.equal(cached(**given), model(**given))
    assert len(cached.cache_report().captures) == 2


def test_tensors_that_are_no_number_keep_their_dtype() -> None:
    """`torch.tensor` and `as_tensor` of a tensor of the call's own."""

    def use(t: Tensor) -> Tensor:
        with_copy = torch.as_tensor(t).clone()
        return torch.full_like(with_copy, 1.0) * torch.asarray(t)

    check(use, lambda v: torch.tensor([float(v)], dtype=torch.float64))
    check(use, lambda v: torch.tensor([float(v)], dtype=torch.bfloat16))
