"""Offloading, with the CPU as the device that is loaded to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

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


OFFLOADS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "groups of blocks": by_groups("block_level"),
    "groups of leaves": by_groups("leaf_level"),
}


@pytest.mark.parametrize("family", [SD3, WAN], ids=lambda family: family.name)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloading(name: str, when: str, family: Family) -> None:
    if name in ("model", "sequential"):
        pytest.importorskip("accelerate")
    pipe = family.build()
    want = {prompt: run(family, pipe, prompt=prompt) for prompt in (0, 1)}
    reference = Session(family, pipe=pipe)
    scheduled = {prompt: reference.by_hand(prompt=prompt) for prompt in (0, 1)}
    if when == "before":
        OFFLOADS[name](pipe)
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
