"""PyTorch's own engines: `fully_shard`, `parallelize_module`, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import dit_cache_fx
from tests.distributed.models import RULED, SCHEDULED, Run, apart, dit, generate
from tests.distributed.pair import WORLD, Pair

Spread = Callable[[nn.Module], nn.Module]


def fsdp(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def tensor_parallel(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model  # type: ignore[no-any-return]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model).eval()


ENGINES: dict[str, Spread] = {
    "fsdp": fsdp,
    "tensor_parallel": tensor_parallel,
    "ddp": ddp,
}


def one_and_two(engine: str, strategy: str, options: dict[str, Any], after: bool) -> Run:
    """A generation on the two processes, compared with one on a process alone."""
    one = generate(dit_cache_fx.apply(dit(), strategy, **options))
    model = dit()
    if after:
        cached: Any = dit_cache_fx.apply(model, strategy, **options)
        ENGINES[engine](model)
    else:
        cached = dit_cache_fx.apply(ENGINES[engine](model), strategy, **options)
    two = generate(cached)
    assert two.actions == one.actions, (two.actions, one.actions)
    assert apart(two.outputs, one.outputs) < 1e-5, apart(two.outputs, one.outputs)
    assert 0 < len({*two.actions}) and two.bytes_held == one.bytes_held
    return two


CASES = [*SCHEDULED.items(), *RULED.items()]


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("engine", ENGINES)
def test_as_one_process(pair: Pair, engine: str, strategy: str, options: dict[str, Any]) -> None:
    first, second = pair.run(one_and_two, engine, strategy, options, False)
    assert first.actions == second.actions
    actions = " ".join(first.actions)
    assert "computed" in actions
    assert "reused" in actions or "predicted" in actions


def test_fully_shard_after_apply(pair: Pair) -> None:
    pair.run(one_and_two, "fsdp", "taylorcache", SCHEDULED["taylorcache"], True)
    pair.run(one_and_two, "fsdp", "teacache", RULED["teacache"], True)
