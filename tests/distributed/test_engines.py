"""PyTorch's own engines: `fully_shard`, `parallelize_module`, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import dit_cache_fx
from tests.distributed.models import (
    RULED,
    SCHEDULED,
    STEPS,
    Call,
    Run,
    apart,
    dit,
    dit_call,
    generate,
)
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
    assert two.bytes_held == one.bytes_held
    return two


CASES = [*SCHEDULED.items(), *RULED.items()]
#: a schedule and a rule: one of the engines takes the others too
USUAL = ("taylorcache", "teacache")


def _cases(usual: Callable[[str], bool]) -> list[Any]:
    return [
        pytest.param(*case, marks=() if usual(case[0]) else pytest.mark.exhaustive)
        for case in CASES
    ]


@pytest.mark.parametrize(
    ("engine", "strategy", "options"),
    [
        pytest.param(engine, *case.values, marks=case.marks)
        for engine in ENGINES
        for case in _cases(lambda name: engine == "fsdp" or name in USUAL)  # noqa: B023
    ],
    ids=lambda v: str(v)[:20],
)
def test_as_one_process(pair: Pair, engine: str, strategy: str, options: dict[str, Any]) -> None:
    first, second = pair.run(one_and_two, engine, strategy, options, False)
    assert first.actions == second.actions
    actions = " ".join(first.actions)
    assert "computed" in actions
    assert "reused" in actions or "predicted" in actions


# --- distributed tensors in and out ---------------------------------------------------------------


def distributed(strategy: str, options: dict[str, Any]) -> float:
    """A generation whose samples and outputs are DTensors, split along the sequence."""
    one = generate(dit_cache_fx.apply(dit(), strategy, **options))
    mesh = init_device_mesh("cpu", (WORLD,))

    def call(step: int, before: torch.Tensor | None) -> Call:
        given = dit_call(step, before)
        x = distribute_tensor(given["x"], mesh, [Shard(1)])
        return {"x": x, "timestep": distribute_tensor(given["timestep"], mesh, [Replicate()])}

    cached = dit_cache_fx.apply(distribute_module(dit(), mesh), strategy, **options)
    two = generate(cached, call, lambda t: t.full_tensor() if isinstance(t, DTensor) else t)
    assert two.actions == one.actions, (two.actions, one.actions)
    assert apart(two.outputs, one.outputs) < 1e-5
    return two.bytes_held / one.bytes_held


@pytest.mark.parametrize(
    ("strategy", "options"), _cases(USUAL.__contains__), ids=lambda v: str(v)[:20]
)
def test_distributed_tensors(pair: Pair, strategy: str, options: dict[str, Any]) -> None:
    for share in pair.run(distributed, strategy, options):
        assert share == pytest.approx(0.5, abs=0.03)  # and what is measured


# --- compiled -------------------------------------------------------------------------------------


def compiled(engine: str, way: str, strategy: str, options: dict[str, Any]) -> bool:
    """A generation of a compiled model that the processes run together."""
    want = generate(dit_cache_fx.apply(dit(), strategy, **options))
    torch._dynamo.reset()
    model: Any = ENGINES[engine](dit())
    whole = engine == "tensor_parallel"  # the others' own hooks break the graph
    if way == "backend":
        cache: Any = dit_cache_fx.backend(strategy, inner="aot_eager", **options)
        model = torch.compile(model, backend=cache, fullgraph=whole)
    else:
        cache = model = dit_cache_fx.apply(model, strategy, **options)
    if way == "compile":
        model = torch.compile(model, backend="aot_eager", fullgraph=whole)
    elif way == "compile_steps":
        model.compile_steps(backend="aot_eager", fullgraph=whole)
    got = generate(model)
    actions = [f"{r.step} {r.action}" for r in cache.cache_report().timeline]
    assert apart(got.outputs, want.outputs) < 1e-5
    return actions == want.actions


@pytest.mark.parametrize(
    "way",
    [
        "compile",
        *(pytest.param(w, marks=pytest.mark.exhaustive) for w in ("compile_steps", "backend")),
    ],
)
def test_compiled(pair: Pair, way: str) -> None:
    assert all(pair.run(compiled, "tensor_parallel", way, "teacache", RULED["teacache"]))


SHARDED = [("teacache", RULED["teacache"]), *SCHEDULED.items()]


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["compile", "compile_steps"])
@pytest.mark.parametrize("case", SHARDED, ids=lambda c: c[0])
def test_fully_shard_compiled(pair: Pair, way: str, case: tuple[str, dict[str, Any]]) -> None:
    assert all(pair.run(compiled, "fsdp", way, *case))


def uncached_with_backend() -> None:
    """A sharded model with `backend()`: Dynamo splits it inside its blocks."""
    want = generate(fsdp(dit()))
    torch._dynamo.reset()
    cache = dit_cache_fx.backend("deepcache", inner="aot_eager", **SCHEDULED["deepcache"])
    got = generate(torch.compile(fsdp(dit()), backend=cache))
    assert all(map(torch.equal, got.outputs, want.outputs))
    assert not cache.cache_report().captures


@pytest.mark.exhaustive
def test_fully_shard_with_backend_is_not_cached(pair: Pair) -> None:
    pair.run(uncached_with_backend)


def test_fully_shard_after_apply(pair: Pair) -> None:
    pair.run(one_and_two, "fsdp", "taylorcache", SCHEDULED["taylorcache"], True)
    pair.run(one_and_two, "fsdp", "teacache", RULED["teacache"], True)


def wrapped() -> list[str]:
    """DDP around the cached model."""
    one = generate(dit_cache_fx.apply(dit(), "teacache", **RULED["teacache"]))
    cached = dit_cache_fx.apply(dit(), "teacache", **RULED["teacache"])
    two = generate(DistributedDataParallel(cached).eval())
    assert apart(two.outputs, one.outputs) < 1e-5
    return [f"{r.step} {r.action}" for r in cached.cache_report().timeline]


def test_ddp_around_the_cached_model(pair: Pair) -> None:
    first, second = pair.run(wrapped)
    assert first == second
    assert len(first) == STEPS
