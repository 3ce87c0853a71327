"""A run that reads what an earlier run has made: a U-shape around a block that always runs.

The value is held for it. A block of the earlier run runs once on a computed step, and not at all on
a reused one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_cache_fx
from tests.toys import TOY, ByHand, UShapeDiT, generation, make, runs_of

COMPUTED = {0, 2, 3}


def called(mode: str, model: Any, never: set[int]) -> Callable[..., Any]:
    """The cached model, called in one of the ways there are."""
    options: dict[str, Any] = {"no_cache_steps": COMPUTED, "no_cache_block_id": {"blocks": never}}
    if mode == "backend":
        backend = dit_cache_fx.backend("deepcache", inner="eager", blocks="blocks", **options)
        return torch.compile(model, backend=backend)
    cached = dit_cache_fx.apply(model, "deepcache", **options)
    return torch.compile(cached, backend="eager") if mode == "compile" else cached


@pytest.mark.parametrize("mode", ["eager", "compile", "backend"])
@pytest.mark.parametrize("never", [{2}, {0, 2}, {3}])
def test_the_outputs_are_those_by_hand(mode: str, never: set[int]) -> None:
    model = make(UShapeDiT)
    by_hand = ByHand(model, ["blocks"], [f"blocks.{i}" for i in never])
    answers = called(mode, model, never)
    with torch.no_grad():
        for step, (computes, inputs) in enumerate(generation(TOY, COMPUTED)):
            assert torch.equal(answers(**inputs), by_hand(computes, **inputs)), step


@pytest.mark.parametrize("strategy", ["deepcache", "teacache", "taylorcache"])
def test_each_block_runs_on_computed_steps_alone(strategy: str) -> None:
    model = make(UShapeDiT)
    cached = dit_cache_fx.apply(
        model, strategy, no_cache_steps=COMPUTED, no_cache_block_id={"blocks": {2}}
    )
    with torch.no_grad(), runs_of(model.blocks) as counts:
        for computes, inputs in generation(TOY, COMPUTED):
            output = cached(**inputs)
            if computes:
                assert torch.equal(output, cached._model.forward(**inputs))
    # on three steps of six, and three times more to compare with
    assert counts == [6, 6, 9, 6, 6]
