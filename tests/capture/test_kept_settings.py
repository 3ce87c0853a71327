"""Attributes that forward sets on its blocks and leaves there: each call has its own value.

What one call leaves may be what the next one sets, so that nothing changes there. The graph sets it
all the same, or is captured again where the model finds something else.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import DitCacheWarning
from tests.toys import Block, ToyDiT, make, toy_inputs

pytestmark = pytest.mark.usefixtures("no_grad")


class ScaledBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.fails = False

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        if self.fails:
            raise ZeroDivisionError
        return h + self.scale * (super().forward(h, c) - h)


class LeavingDiT(ToyDiT):
    """Sets the strength of its blocks in each call, and takes it back in none."""

    def block(self) -> ScaledBlock:
        return ScaledBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, strength: float = 1.0) -> Any:  # type: ignore[override]
        for block in self.blocks:
            block.scale = strength
        return super().forward(x, timestep, text)


class TakingBackDiT(LeavingDiT):
    """Takes it back, unless a block raises."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for block in self.blocks:
            block.scale = 1.0
        return output


#: the strength and the batch of each call
CALLS = [(0.5, 1), (0.5, 2), (1.0, 1), (0.5, 2), (1.0, 2), (0.5, 1), (1.0, 1), (0.5, 2)]


def given(strength: float, batch: int, prompt: int) -> dict[str, Any]:
    return toy_inputs(1000.0, prompt=prompt, batch=batch) | {"strength": strength}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [LeavingDiT, TakingBackDiT])
def test_each_call_has_its_own_value(kind: Callable[..., Any], compiled: bool) -> None:
    model = make(kind)
    alone = copy.deepcopy(model)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    if compiled:
        cached.compile_steps(backend="eager")
    for number, (strength, batch) in enumerate(CALLS):
        inputs = given(strength, batch, prompt=number)
        assert torch.equal(cached(**inputs), alone(**inputs)), number
        assert [block.scale for block in model.blocks] == 3 * [1.0]  # as a run of a graph leaves it
    assert len(cached.cache_report().captures) == 4


def test_after_a_call_that_the_model_itself_answers() -> None:
    """It leaves another value than the one that the graph was captured with."""
    model = make(LeavingDiT)
    alone = copy.deepcopy(model)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    for strength, batch in CALLS[:3]:
        cached(**given(strength, batch, prompt=0))
    for strength in (0.5, 0.25):
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DitCacheWarning)
            cached(**given(strength, 1, prompt=1))
        inputs = given(1.0, 1, prompt=2 + int(4 * strength))
        assert torch.equal(cached(**inputs), alone(**inputs)), strength


@pytest.mark.parametrize("failing", range(3))
def test_a_first_call_that_raises_leaves_no_value(failing: int) -> None:
    model = make(TakingBackDiT)
    alone = copy.deepcopy(model)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    block = model.blocks[failing]
    block.fails = True
    with suppress(ZeroDivisionError):
        cached(**given(0.5, 1, prompt=0))
    block.fails = False
    assert [b.scale for b in model.blocks] == 3 * [1.0]
    for number, strength in enumerate((0.5, 1.0, 0.5)):
        inputs = given(strength, 1, prompt=number)
        assert torch.equal(cached(**inputs), alone(**inputs)), number
