"""Wan2.2: two transformers share one run's steps, each with a cache of its own."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import dit_cache_fx
from tests.pipelines.blocks import counted, reused_by_hand
from tests.pipelines.families.wan import WAN
from tests.pipelines.family import run
from tests.zoo.case import built
from tests.zoo.diffusers_models import build_wan

STEPS = 8
COMPUTED = {0, 2}  # of each expert's own steps


pytestmark = pytest.mark.usefixtures("no_grad")


def build() -> DiffusionPipeline:
    pipe = WAN.build()
    pipe.register_modules(transformer_2=built(build_wan, 2))
    pipe.register_to_config(boundary_ratio=0.8)
    return pipe


def generate(pipe: DiffusionPipeline, prompt: int, guided: bool) -> Tensor:
    return run(WAN, pipe, steps=STEPS, prompt=prompt, guided=guided)


@pytest.mark.parametrize("guided", [False, True])
def test_each_expert_starts_with_nothing_where_the_run_reaches_it(guided: bool) -> None:
    pipe = build()
    experts = {name: getattr(pipe, name) for name in ("transformer", "transformer_2")}
    passes = WAN.passes if guided else 1
    calls = {passes * step + branch for step in COMPUTED for branch in range(passes)}
    with ExitStack() as stack:
        runs = [stack.enter_context(counted(m, WAN.blocks)) for m in experts.values()]
        generate(pipe, 0, guided)
    depth = len(experts["transformer"].blocks)
    own = [count.calls // depth // passes for count in runs]
    assert sum(own) == STEPS
    assert min(own) >= 3

    want = []
    for prompt in (0, 1, 0):
        with ExitStack() as stack:
            for model in experts.values():
                stack.enter_context(reused_by_hand(model, WAN.blocks, calls, passes))
            want.append(generate(pipe, prompt, guided))
    cache = partial(dit_cache_fx.apply, strategy="deepcache", no_cache_steps=COMPUTED)
    for name, model in experts.items():
        setattr(pipe, name, cache(model))
    got = [generate(pipe, prompt, guided) for prompt in (0, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for name, steps in zip(experts, own, strict=True):
        records = getattr(pipe, name).cache_report().timeline[-passes * steps :]
        assert {r.step for r in records if r.action == "computed"} == COMPUTED
