"""`backend()` where weights are tensor subclasses, as quantisation libraries make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from tests.dynamo.test_backend import STEPS, TIMES, actions, compare
from tests.pipelines.int8 import quantise
from tests.toys import ByHand, ToyDiT, make, toy_inputs


def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quanto_int8(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("quantised", ["blocks", "everything"])
def test_weights_that_are_tensor_subclasses(quantised: str, inner: str) -> None:
    model = make(ToyDiT)
    quantise(model.blocks if quantised == "blocks" else model)  # type: ignore[arg-type]
    cache = dit_cache_fx.backend("deepcache", inner=inner, no_cache_steps=STEPS)
    compiled = torch.compile(model, backend=cache, fullgraph=True)
    for prompt in range(2):
        compare(compiled, ByHand(model, ["blocks"]), prompt=prompt)
        assert actions(cache) == "CCrrCr"


@pytest.mark.parametrize("quantise_with", [torchao_int8, quanto_int8])
def test_what_the_libraries_make(quantise_with: Any) -> None:
    model = make(ToyDiT)
    quantise_with(model)
    eager = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    cache = dit_cache_fx.backend("deepcache", inner="aot_eager", no_cache_steps=STEPS)
    compiled = torch.compile(model, backend=cache, fullgraph=True)
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        torch.testing.assert_close(compiled(**inputs), eager(**inputs), msg=f"step {step}")
    assert actions(cache) == "CCrrCr"


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("taylorcache", {"no_cache_steps": STEPS}),
        ("teacache", {"rel_l1_thresh": 0.05}),
        ("firstblockcache", {}),
    ],
)
def test_every_strategy_gives_what_the_eager_cached_model_gives(
    strategy: str, options: dict[str, Any]
) -> None:
    model = make(ToyDiT)
    quantise(model)
    eager = dit_cache_fx.apply(model, strategy, **options)
    cache = dit_cache_fx.backend(strategy, inner="aot_eager", **options)
    compiled = torch.compile(model, backend=cache, fullgraph=True)
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        torch.testing.assert_close(compiled(**inputs), eager(**inputs), msg=f"step {step}")
    wanted = [record.action for record in eager.cache_report().timeline]
    assert [record.action for record in cache.cache_report().timeline] == wanted
