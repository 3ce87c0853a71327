"""One step of a branch, without a model."""

from __future__ import annotations

import torch

from dit_cache_fx import DeepCache, TeaCache
from dit_cache_fx.runtime.step import MISSING, Step
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.strategies import Clock
from dit_cache_fx.values.tensor_spec import TensorSpec

SPECS = {"value": TensorSpec(torch.Size([4]), torch.float32, torch.device("cpu"))}


def step(branch: Branch, index: int) -> Step:
    return Step(DeepCache(no_cache_steps={0}), branch, index, SPECS)


def test_a_held_tensor_that_was_changed_in_place_is_not_used() -> None:
    """A hook may do that, which was put on the layer that a held tensor is given to."""
    branch, value = Branch(), torch.ones(4)
    step(branch, 0).commit([], [], [value])
    reused = step(branch, 1)
    assert not reused.computes
    assert torch.equal(reused.given(SPECS)["value"], torch.ones(4))
    value.add_(1)
    computed = step(branch, 2)
    assert (computed.computes, computed.why) == (True, MISSING)
    assert torch.equal(computed.given(SPECS)["value"], torch.zeros(4))


def test_a_second_evaluation_of_a_step_counts_once() -> None:
    """As often as a step is computed, the next one is as far from it and from the one before."""
    branch = Branch()
    for index in (0, 3, 3, 3):
        computed = Step(DeepCache(no_cache_steps={0, 3}), branch, index, SPECS)
        computed.commit([], [], [torch.full([4], float(index))])
    given = step(branch, 5).given([*Clock._fields, *SPECS])
    assert torch.equal(given["value"], torch.full([4], 3.0))
    clock = {name: given[name].item() for name in ("computed", "distance", "reach")}
    assert clock == {"computed": 2, "distance": 2, "reach": 3}


def test_a_rule_that_is_asked_twice_for_one_step_gives_one_answer() -> None:
    """As where the graph with the decision cannot be compiled, and others take its place."""
    rule, branch = TeaCache(rel_l1_thresh=0.4), Branch()
    values = [torch.full([4], value) for value in (1.0, 1.3, 1.6, 1.7)]
    computed = []
    for index, value in enumerate(values):
        asked = Step(rule, branch, index, SPECS)
        asked.decide(value)
        asked.decide(value)
        computed.append(asked.computes)
        asked.commit([], [], [value])
    assert computed == [True, False, True, False]
