"""Offloading, with the CPU as the device that is loaded to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from dit_cache_fx import OptionError
from tests.pipelines.families import SD3, WAN, Family
from tests.pipelines.family import run
from tests.pipelines.session import Session

CPU = torch.device("cpu")


def by_groups(kind: str) -> Callable[[DiffusionPipeline], None]:
    def offload(pipe: DiffusionPipeline) -> None:
        blocks = 1 if kind == "block_level" else None
        apply_group_offloading(
            pipe.transformer, CPU, CPU, offload_type=kind, num_blocks_per_group=blocks
        )

    return offload


def layer_by_layer(pipe: DiffusionPipeline) -> None:
    """What `enable_sequential_cpu_offload` does, which itself refuses a CPU as the device.

    Weights are on the meta device whenever their module does not run.
    """
    hooks = pytest.importorskip("accelerate.hooks")

    class Away(hooks.ModelHook):  # type: ignore[misc, name-defined]
        execution_device = CPU  # the pipeline asks for it

        def init_hook(self, module: nn.Module) -> nn.Module:
            self.weights = dict(module._parameters)
            self.post_forward(module, None)
            return module

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            module._parameters.update(self.weights)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            for name, weight in self.weights.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
            return output

    for model in (m for m in pipe.components.values() if isinstance(m, nn.Module)):
        for module in model.modules():
            if module is model or next(module.parameters(recurse=False), None) is not None:
                hooks.add_hook_to_module(module, Away())


OFFLOADS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "layer by layer": layer_by_layer,
    "groups of blocks": by_groups("block_level"),
    "groups of leaves": by_groups("leaf_level"),
}


@pytest.mark.parametrize(
    "family",
    [SD3, pytest.param(WAN, marks=pytest.mark.exhaustive)],
    ids=lambda family: family.name,
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloading(name: str, when: str, family: Family) -> None:
    if name == "model":
        pytest.importorskip("accelerate")
    pipe = family.build()
    want = {prompt: run(family, pipe, prompt=prompt) for prompt in (0, 1)}
    reference = Session(family, pipe=pipe)
    scheduled = {prompt: reference.by_hand(prompt=prompt) for prompt in (0, 1)}
    if when == "before":
        OFFLOADS[name](pipe)
        if name == "layer by layer":
            with pytest.raises(OptionError, match=r"weights on the meta device.*apply first"):
                Session(family, pipe=pipe)
            return
    session = Session(family, pipe=pipe)
    pipe.transformer = session.cached
    if when == "after":
        OFFLOADS[name](pipe)
    for prompt in (0, 1):
        with session.counts() as count:
            got = run(family, pipe, prompt=prompt)
        assert torch.equal(got, scheduled[prompt])
        assert count.calls == session.expected_calls()
    session.cached.disable()
    assert torch.equal(run(family, pipe), want[0])
