"""What surrounds a first call: modes that look on, defaults of the process, autograd functions."""

# ruff: noqa: ARG004

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dit_cache_fx
from dit_cache_fx.capture.autograd_functions import forward_only
from tests.toys import TOY, ByHand, ToyDiT, actions, default_dtype, follows, generation, make

STEPS = {0, 2, 3}
STRATEGIES: dict[str, dict[str, Any]] = {
    "deepcache": {"no_cache_steps": STEPS},
    "taylorcache": {"no_cache_steps": STEPS},
    "teacache": {"rel_l1_thresh": 2.0},
}


pytestmark = pytest.mark.usefixtures("no_grad")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "a dispatch mode": Watching,
    "profiler": torch.profiler.profile,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "the device cpu": lambda: default_device("cpu"),
    "another device": lambda: torch.device("meta"),  # as "cuda" is, for tensors on the CPU
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "inference_mode": torch.inference_mode,
}
#: what graphs depend on: with another one, a call is for another graph
LASTING = {"float64", "bfloat16"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("around", AROUND)
def test_around_the_first_call(around: str, strategy: str) -> None:
    model = make(ToyDiT)
    plain, cached = (dit_cache_fx.apply(model, strategy, **STRATEGIES[strategy]) for _ in range(2))
    for step, (_, inputs) in enumerate(generation(TOY, STEPS)):
        want = plain(**inputs)
        with nullcontext() if step and around not in LASTING else AROUND[around]():
            got = cached(**inputs)
        if not step:
            assert torch.equal(got, model(**inputs))
        assert torch.equal(got, want)
    assert actions(cached) == actions(plain)
    assert {*actions(cached)} == {"C", "r"}
    assert len(cached.cache_report().captures) == 1


def test_flops_of_the_blocks_are_counted_once() -> None:
    """The first call runs what is around the blocks twice: the second time as a graph."""
    model = make(ToyDiT)
    _, inputs = generation(TOY, STEPS)[0]

    def counted(module: Callable[..., Any]) -> int:
        with FlopCounterMode(display=False) as flops:
            module(**inputs)
        return int(flops.get_total_flops())

    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    c, h = torch.ones(1, 8), torch.ones(1, 6, 8)
    with FlopCounterMode(display=False) as blocks:
        model.trunk(h, c)
    around = counted(model) - blocks.get_total_flops()
    assert counted(cached) == counted(model) + around
    cached.clear_states()
    assert counted(cached) == counted(model)


# --- autograd functions ---------------------------------------------------------------------------


class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 2.0) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        assert ctx.needs_input_grad == (False, False)
        return torch.sin(x) * scale, x + 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError


class Newer(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 0.5

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        raise AssertionError


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        return x.mul_(1.5)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        raise AssertionError


class FunctionsDiT(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        a, b = Older.apply(c, 3.0)
        return Dirty.apply(Newer.apply(super().trunk(Dirty.apply(h), a + b)))


class CheckpointedDiT(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=True)
        return h


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [FunctionsDiT, CheckpointedDiT])
def test_autograd_functions_of_the_models_own(kind: type[nn.Module]) -> None:
    model = make(kind)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_autograd_functions_are_as_they_were_afterwards() -> None:
    before = vars(torch.autograd.Function)["apply"]
    with forward_only():
        assert vars(torch.autograd.Function)["apply"] is not before
        assert torch.equal(Newer.apply(torch.ones(1)), torch.full((1,), 0.5))
    with pytest.raises(TypeError), forward_only():
        Newer.apply(None)
    assert vars(torch.autograd.Function)["apply"] is before
    x = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        assert Newer.apply(x).grad_fn is not None
