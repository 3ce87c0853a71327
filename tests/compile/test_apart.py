"""`torch.compile(fullgraph=True)` where `cond` does not take what a model is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from tests.compile.compiling import STEPS, Counting, breaks, compiled, no_recompile
from tests.pipelines.int8 import quantise
from tests.toys import DIM, Block, ByHand, MaskedDiT, ToyDiT, make, toy_inputs

TIMES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


class ParallelDiT(ToyDiT):
    """Takes two more inputs of each token, such as cosines and sines of its position."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, angles: Any) -> Any:  # type: ignore[override]
        return super().forward(x * angles[0] + angles[1], timestep, text)


class TiedBlock(Block):
    """A block with two weights that are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(2 * DIM, DIM)
        self.modulation.weight = nn.Parameter(both[:DIM])
        self.mix.weight = nn.Parameter(both[DIM:])


class TiedDiT(ToyDiT):
    def block(self) -> nn.Module:
        return TiedBlock()


def run(model: nn.Module, backend: Counting, **more: Any) -> None:
    """Two generations, each bit by bit what is done by hand."""
    cached = compiled(dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS), backend)
    for prompt in range(2):
        by_hand = ByHand(model, ["blocks"])
        for step, time in enumerate(TIMES):
            inputs = {**toy_inputs(time, seed=step, prompt=prompt), **more}
            assert torch.equal(cached(**inputs), by_hand(step in STEPS, **inputs)), step
    assert breaks() == 0


def test_inputs_that_are_views_of_one_tensor() -> None:
    both = torch.randn(2, 1, 6, DIM, generator=torch.Generator().manual_seed(0))
    backend = Counting("aot_eager")
    run(make(ParallelDiT), backend, angles=both.unbind())
    assert (backend.count, backend.calls(torch.ops.higher_order.cond)) == (1, 1)


def test_weights_that_are_views_of_one_tensor() -> None:
    backend = Counting("aot_eager")
    run(make(TiedDiT), backend)
    assert backend.count == 3  # one graph could not be compiled: then one for each kind of step


def test_weights_that_are_tensor_subclasses() -> None:
    model = make(ToyDiT)
    quantise(model)
    run(model, Counting("aot_eager"))


def test_each_kind_of_step_is_compiled_once() -> None:
    model = make(TiedDiT)
    run(model, Counting("aot_eager"))
    with no_recompile():
        cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
        fast = compiled(cached, "aot_eager")
        eager = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
        for step, time in enumerate(TIMES):
            inputs = toy_inputs(time, seed=step)
            torch.testing.assert_close(fast(**inputs), eager(**inputs))


class TiedMaskedDiT(MaskedDiT):
    def block(self) -> nn.Module:
        return TiedBlock()


class BreakingBlock(TiedBlock):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(h, c)


class BreakingDiT(ToyDiT):
    def block(self) -> nn.Module:
        return BreakingBlock()


def test_what_breaks_by_itself_still_raises() -> None:
    cached = dit_cache_fx.apply(make(BreakingDiT), "deepcache", no_cache_steps=STEPS)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"graph_break"):
        compiled(cached, "eager")(**toy_inputs(1.0))
