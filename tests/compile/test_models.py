"""Every model of the zoo compiles into one graph that decides by itself, with every strategy.

The models have one block of each kind: what Dynamo needs for a block is most of the time here. Each
representative takes one scheduled strategy through AOTAutograd, and one TeaCache's own rule;
`-m exhaustive` runs all models and all strategies both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from tests.compile.compiling import (
    SCHEDULED,
    STRATEGIES,
    Counting,
    assert_same,
    breaks,
    calls_of,
    compiled,
    no_recompile,
)
from tests.toys import TOY, actions
from tests.zoo import CASES, Case
from tests.zoo.representatives import marks_of

#: another prompt is of another length where the model takes a mask
PROMPTS = (0, 1, 0)
#: takes TeaCache's own rule too
RULED = "WanTransformer3DModel"


def _usual(number: int, case: Case) -> set[tuple[str, str]]:
    """The strategies and compilers of a model in the default run."""
    if case.name == "OfficialHunyuanVideo15":  # compiles as long as the others together
        return set()
    turn = [*SCHEDULED][number % len(SCHEDULED)]
    scheduled = {(turn, "aot_eager")}
    return scheduled | {("rule", "eager")} if case.name == RULED else scheduled


def _matrix() -> Iterator[Any]:
    for number, case in enumerate(CASES):
        for name in STRATEGIES:
            for inner in ("eager", "aot_eager"):
                marks = marks_of(case.name, (name, inner) in _usual(number, case))
                yield pytest.param(case, name, inner, marks=marks, id=f"{case.name}-{name}-{inner}")


def short(case: Case) -> nn.Module:
    """The case's model with the last block of each list alone."""
    model = case.build()
    for name in case.block_lists:
        del model.get_submodule(name)[:-1]
    return model


def assert_one_graph(case: Case, model: nn.Module, name: str, inner: str) -> None:
    """One graph for generation after generation, with the eager cached model's results."""
    strategy, options = STRATEGIES[name]
    eager = dit_cache_fx.apply(model, strategy, **options)
    cached = dit_cache_fx.apply(model, strategy, **options)
    backend = Counting(inner)
    with no_recompile():
        for prompt in PROMPTS:
            assert_same(compiled(cached, backend), eager, calls_of(case, prompt=prompt))
            assert actions(cached) == actions(eager)
            assert {*actions(cached)} == {"C", "r"}
    captures = len(eager.cache_report().captures)  # more where a prompt is another signature
    assert captures == (2 if case.name.startswith("ZImage") else 1)
    assert (backend.count, breaks()) == (captures, 0)
    assert backend.calls(torch.ops.higher_order.cond) == 1


@pytest.mark.parametrize(("case", "name", "inner"), [*_matrix()])
def test_one_graph(case: Case, name: str, inner: str) -> None:
    assert_one_graph(case, short(case), name, inner)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_graph_of_several_blocks(name: str, inner: str) -> None:
    assert_one_graph(TOY, TOY.build(), name, inner)
