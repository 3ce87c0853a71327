"""Processes that calibrate together find one plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_cache_fx
from tests.distributed.models import STEPS, dit
from tests.distributed.pair import Pair
from tests.distributed.test_apart import tokens
from tests.distributed.test_engines import ENGINES


def generated(cached: Any, sample: Tensor) -> Tensor:
    """An Euler sampler's result."""
    for step in range(STEPS):
        noise = cached(x=sample, timestep=torch.full((2,), 1 - step / STEPS))
        sample = sample - noise / STEPS
    return sample


def sample(way: str, seed: int) -> Tensor:
    """What this process draws from: samples of its own, or its part of a sequence."""
    torch.manual_seed(seed + (100 * dist.get_rank() if way == "fsdp" else 0))
    drawn = torch.randn(2, 8, 4)
    return tokens(drawn) if way == "split" else drawn


def calibrated(way: str) -> tuple[str, list[float], list[str]]:
    """The plan for four computed steps, what it reaches, and what it does."""
    model = ENGINES[way](dit()) if way in ENGINES else dit()
    group = dist.group.WORLD if way == "split" else None
    cached = dit_cache_fx.apply(model, "taylorcache", computed_steps=4, process_group=group)
    runs = [lambda seed=seed: generated(cached, sample(way, seed)) for seed in range(3)]
    found = dit_cache_fx.calibrate(cached, runs, computed=4, progress=False)
    planned = dit_cache_fx.apply(model, found.plan(4))
    generated(planned, sample(way, 7))
    actions = [f"{r.step} {r.action}" for r in planned.cache_report().timeline]
    return str(found.plan(4)), [row.psnr for row in found.rows], actions


@pytest.mark.parametrize("way", ["fsdp", "tensor_parallel", "split"])
def test_all_choose_the_same_plan(pair: Pair, way: str) -> None:
    first, second = pair.run(calibrated, way, limit=60)
    assert first == second
    assert sum("computed" in action for action in first[2]) == 4
