"""Offloading that is enabled before `apply`: its hook moves weights, and no graph sees that.

`enable_model_cpu_offload()` moves a model when it is called. Here the device it moves to is the CPU
under another name, so each call moves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from tests.pipelines.families import FLUX, QWEN_IMAGE, SD3, WAN, Family
from tests.pipelines.family import STEPS, run
from tests.toys import ToyDiT, actions, make, toy_inputs

hooks = pytest.importorskip("accelerate.hooks")


@pytest.mark.parametrize("family", [FLUX, QWEN_IMAGE, SD3, WAN], ids=lambda family: family.name)
def test_a_pipeline_that_is_offloaded_already(family: Family) -> None:
    pipe = family.build()
    model, want = pipe.transformer, run(family, pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps=range(STEPS))
    for _ in range(2):  # at the end of a run the pipeline takes the hooks off and puts on others
        assert torch.equal(run(family, pipe), want)
    dit_cache_fx.restore(pipe)
    assert pipe.transformer is model
    assert torch.equal(run(family, pipe), want)


class Moving(hooks.ModelHook):  # type: ignore[misc, name-defined]
    """Moves the weights in front of each call, as if from another device, and notes the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("before")
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        return args, {**kwargs, "x": 2 * kwargs["x"]}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls.append("after")
        return output + 1


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eager", "compile_steps", "compiled"])
def test_a_hook_runs_once_around_each_call(mode: str) -> None:
    plain, model, moving = make(ToyDiT), make(ToyDiT), Moving()
    hooks.add_hook_to_module(model, moving)
    cached: Any = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
    called = cached
    if mode == "compile_steps":
        cached.compile_steps(backend="eager")
    if mode == "compiled":
        called = torch.compile(cached, backend="eager")
    reference = dit_cache_fx.apply(plain, "deepcache", no_cache_steps={0, 2})
    for step in range(4):
        moving.calls.clear()
        inputs = toy_inputs(1000.0 - 100 * step, seed=step)
        got = called(**inputs)
        assert torch.equal(got, reference(**{**inputs, "x": 2 * inputs["x"]}) + 1), step
        assert moving.calls == ["before", "after"]
    assert actions(cached) == "CrCr"
    cached.disable()
    moving.calls.clear()
    assert torch.equal(called(**inputs), plain(**{**inputs, "x": 2 * inputs["x"]}) + 1)
    assert moving.calls == ["before", "after"]


@torch.no_grad()
def test_rows_of_a_batch_are_checked_without_it() -> None:
    model, moving = make(ToyDiT), Moving()
    plain = make(ToyDiT)
    hooks.add_hook_to_module(model, moving)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    inputs = toy_inputs(1000.0, batch=2)
    with cached.batch([cached.new_session() for _ in range(2)]):
        got = cached(**inputs)
    want = plain(**{**inputs, "x": 2 * inputs["x"]}) + 1
    torch.testing.assert_close(got, want)
    assert moving.calls == ["before", "after"]
