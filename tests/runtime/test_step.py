"""One step of a branch, without a model."""

from __future__ import annotations

import torch

from dit_cache_fx import DeepCache
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.step import MISSING, Step
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
