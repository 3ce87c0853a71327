"""`compile_steps`, and hooks on blocks that come and go after the compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import dit_cache_fx
from dit_cache_fx.runtime import step_compiler
from tests.compile.compiling import Counting
from tests.toys import ToyDiT, make, toy_inputs

#: registers a hook that changes what a block gives by a factor
Register = Callable[[nn.Module, float], RemovableHandle]


def behind(block: nn.Module, factor: float) -> RemovableHandle:
    return block.register_forward_hook(lambda _, __, output: output * factor)


def before(block: nn.Module, factor: float) -> RemovableHandle:
    return block.register_forward_pre_hook(lambda _, given: (given[0] * factor, *given[1:]))


class Compared:
    """A compiled cached model that is called step by step, beside the model."""

    def __init__(self, steps: set[int]) -> None:
        self.model = make(ToyDiT)
        self.counting = Counting()
        self._cached = dit_cache_fx.apply(
            self.model, "deepcache", no_cache_steps=steps, no_cache_block_id={"blocks": {2}}
        )
        self._cached.compile_steps(backend=self.counting)
        self._step = 0

    def step(self) -> str:
        """Do a step; a computed one has to give what the model gives."""
        given: dict[str, Any] = toy_inputs(900.0 - 50 * self._step)
        self._step += 1
        with torch.no_grad():
            got, want = self._cached(**given), self.model(**given)
        action: str = self._cached.cache_report().timeline[-1].action
        if action == "computed":
            torch.testing.assert_close(got, want)
        return action


@pytest.mark.parametrize("register", [behind, before])
def test_a_hook_acts_from_its_registration_to_its_removal(register: Register) -> None:
    compared = Compared(steps={0, 1, 2, 3, 4, 5})
    compared.step()
    handle = register(compared.model.blocks[0], 1.5)
    compared.step()
    handle.remove()
    compared.step()
    assert compared.counting.count == 2  # the first graph again
    handle = register(compared.model.blocks[0], 0.5)
    compared.step()
    compared.step()
    handle.remove()
    compared.step()
    assert compared.counting.count == 3


def test_a_hook_on_a_block_that_is_not_cached_acts_on_reused_steps() -> None:
    compared = Compared(steps={0})
    outputs: list[Tensor] = []
    compared.model.head.register_forward_hook(lambda _, given, __: outputs.append(given[0]))
    compared.step()
    assert compared.step() == "reused"
    before_, _ = outputs[-2:]
    compared.model.blocks[2].register_forward_hook(lambda *_: torch.zeros_like(before_))
    assert compared.step() == "reused"
    assert not outputs[-2].any()  # the cached model's; the last one is the model's


def test_with_ever_new_hooks_a_graph_runs_as_it_is() -> None:
    compared = Compared(steps=set(range(20)))
    for _ in range(step_compiler.MAX_HOOKED + 4):
        handle = behind(compared.model.blocks[1], 1.5)
        compared.step()
        handle.remove()
    assert compared.counting.count == step_compiler.MAX_HOOKED
