"""Whole pipelines on the GPU: what they give on computed steps, and what a preset computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_cache_fx
from tests.device.places import CUDA, on
from tests.pipelines.families import FAMILIES, Family
from tests.pipelines.families.wan22 import WAN22
from tests.pipelines.family import STEPS, run

each_family = pytest.mark.parametrize("family", [*FAMILIES, WAN22], ids=lambda family: family.name)


@pytest.mark.parametrize("device", [CUDA])
@each_family
def test_a_pipeline_with_every_step_computed(family: Family, device: str) -> None:
    pipe = family.build().to(device)
    given: dict[str, Any] = on(device, family.arguments())
    want = run(family, pipe, **given)
    dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps=range(STEPS))
    for _ in range(2):
        assert torch.equal(run(family, pipe, **given), want)
    dit_cache_fx.restore(pipe)
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=3)
    for _ in range(2):
        run(family, pipe, **given)
    report = pipe.transformer.cache_report()
    assert report.calls_computed > 0
    assert report.steps_computed + report.steps_reused <= STEPS
