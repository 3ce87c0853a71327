"""Held tensors have the same strides on every step: for others a graph would be compiled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dit_cache_fx
from tests.compile.compiling import STEPS, calls_of, compiled, no_recompile
from tests.toys import TOY, Block, ToyDiT, actions, make


class TransposedBlock(Block):
    """Its result is laid out channels first."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c).transpose(1, 2).contiguous().transpose(1, 2)


class TransposedDiT(ToyDiT):
    def block(self) -> nn.Module:
        return TransposedBlock()


@pytest.fixture
def model() -> nn.Module:
    return make(TransposedDiT)


@pytest.mark.parametrize("strategy", ["taylorcache", "teacache"])
def test_compiled_steps_are_compiled_once(model: nn.Module, strategy: str) -> None:
    eager = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    cached.compile_steps(backend="eager")
    with no_recompile():
        for inputs in calls_of(TOY):
            torch.testing.assert_close(cached(**inputs), eager(**inputs))
    assert actions(cached) == "CrCCrr"


@pytest.mark.parametrize("strategy", ["taylorcache", "teacache"])
def test_one_graph_is_compiled_once(model: nn.Module, strategy: str) -> None:
    eager = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    run = compiled(cached, "eager")
    with no_recompile():
        for inputs in calls_of(TOY):
            torch.testing.assert_close(run(**inputs), eager(**inputs))
    assert actions(cached) == "CrCCrr"


class Strides:
    """An inner backend that notes the strides of what each graph is given."""

    def __init__(self) -> None:
        self.seen: list[set[Any]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen: set[Any] = {tuple(t.stride() for t in inputs)}
        self.seen.append(seen)

        def run(*operands: Tensor) -> Any:
            seen.add(tuple(t.stride() for t in operands))
            return gm(*operands)

        return run


def test_the_graphs_of_a_backend_get_the_strides_that_they_were_compiled_for(
    model: nn.Module,
) -> None:
    inner = Strides()
    cache = dit_cache_fx.backend("taylorcache", no_cache_steps=STEPS, inner=inner)
    run = torch.compile(model, backend=cache, fullgraph=True)
    for inputs in calls_of(TOY):
        run(**inputs)
    assert [len(seen) for seen in inner.seen] == [1, 1]


def test_what_an_eager_step_holds_does_for_the_one_graph(model: nn.Module) -> None:
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
    eager = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
    run = compiled(cached, "eager")
    with no_recompile():
        for step, inputs in enumerate(calls_of(TOY)):
            called = cached if step == 3 else run
            torch.testing.assert_close(called(**inputs), eager(**inputs))
    assert actions(cached) == "CrCCrr"


def test_what_an_eager_rule_remembers_does_for_the_one_graph(model: nn.Module) -> None:
    """The first block's residual has the strides of what the block gave, at first there is none."""
    options = {"threshold": 1.0, "max_reused_in_a_row": 1}
    cached = dit_cache_fx.apply(model, "firstblockcache", **options)
    eager = dit_cache_fx.apply(model, "firstblockcache", **options)
    run = compiled(cached, "eager")
    with no_recompile():
        for step, inputs in enumerate(calls_of(TOY)):
            called = cached if step == 3 else run
            torch.testing.assert_close(called(**inputs), eager(**inputs))
    assert {*actions(cached)} == {"C", "r"}
