"""What is changed between calls of a compiled model takes effect; blocks that break the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.compile.compiling import (
    STEPS,
    Counting,
    assert_same,
    breaks,
    calls_of,
    compiled,
    no_recompile,
)
from tests.toys import (
    DIM,
    TOY,
    Block,
    ByHand,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    new,
    toy_inputs,
)
from tests.zoo.case import redraw

#: for a break in the model, and for one in a branch of `cond`
DYNAMOS_OWN = (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UncapturedHigherOrderOpError)


def cache_of(model: nn.Module) -> CachedModel:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)


@pytest.fixture
def model() -> nn.Module:
    return make(ToyDiT)


# --- the model changes ---------------------------------------------------------------------------


def test_other_weights_need_no_other_graph(model: nn.Module) -> None:
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend)
    with no_recompile():
        for seed in (0, 7):
            redraw(model, seed)
            follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert backend.count == 1


@pytest.mark.parametrize("where", ["block", "head"])
def test_a_replaced_layer(model: nn.Module, where: str) -> None:
    compiled_model = compiled(cache_of(model), "eager")
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    if where == "block":
        model.blocks[1] = new(Block)
    else:
        model.head = nn.Sequential(new(nn.Linear, DIM, DIM), nn.Tanh())
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS, prompt=1))


def test_an_adapter(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["mix", "head"], init_lora_weights=False)
    compiled_model = compiled(cache_of(model), "eager")
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    plain = model(**toy_inputs(1000.0))
    peft.inject_adapter_in_model(config, model)
    assert not torch.equal(model(**toy_inputs(1000.0)), plain)
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS, prompt=1))


def test_disabled_it_is_the_model_and_enabled_it_caches_again(model: nn.Module) -> None:
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend)
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    cached.disable()
    assert_same(compiled_model, model, calls_of(TOY))
    assert cached.cache_report().bytes_held == 0
    cached.enable()
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert backend.count <= 2  # the cached graph, and that of the model itself
    assert breaks() == 0


def test_forgetting_graphs_makes_new_ones(model: nn.Module) -> None:
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend)
    for count in (1, 2):
        follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
        assert backend.count == count
        cached.reset_states()
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS)[:2])
    cached.clear_states()  # keeps them
    follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert backend.count == 3


def test_a_model_without_blocks_is_refused_and_compiles_as_ever() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()).eval()
    with pytest.raises(dit_cache_fx.DiscoveryError, match="no block list found"):
        cache_of(model)
    backend, x = Counting(), torch.ones(2, DIM)
    assert torch.equal(compiled(model, backend)(x), model(x))
    assert (backend.count, breaks()) == (1, 0)


# --- blocks that break the graph -----------------------------------------------------------------


class BreakingBlock(Block):
    """Its own code breaks Dynamo's graph once."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + 1
        torch._dynamo.graph_break()
        return super().forward(h, c)


class BreakingDiT(ToyDiT):
    def block(self) -> nn.Module:
        return BreakingBlock()


def test_no_break_beyond_the_models_own() -> None:
    model = make(BreakingDiT)
    torch.compile(model, backend="eager")(**toy_inputs(1000.0))
    own = breaks()
    assert own >= 1
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cached = cache_of(model)
    compiled_model = torch.compile(cached, backend="eager")
    for prompt in (0, 1):
        calls = generation(TOY, STEPS, prompt=prompt)
        follows(compiled_model, ByHand(model, ["blocks"]), calls)
        assert actions(cached) == "CrCCrr"
    assert breaks() <= own


def test_a_break_raises_with_fullgraph_as_it_does_without_the_library() -> None:
    model = make(BreakingDiT)
    texts = []
    for each in (model, cache_of(model)):
        with pytest.raises(DYNAMOS_OWN, match="graph_break") as error:
            compiled(each, "eager")(**toy_inputs(1000.0))
        texts.append(str(error.value))
        torch._dynamo.reset()
    assert all("torch._dynamo.graph_break" in text for text in texts)


def test_nothing_is_noted_of_a_call_that_does_not_compile() -> None:
    model = make(BreakingDiT)
    cached = cache_of(model)
    with pytest.raises(DYNAMOS_OWN):
        compiled(cached, "eager")(**toy_inputs(1000.0))
    torch._dynamo.reset()
    assert actions(cached) == ""
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))


# --- blocks that are compiled by themselves ------------------------------------------------------


def test_compiled_blocks_are_called_from_the_cached_graph(model: nn.Module) -> None:
    """As diffusers' `compile_repeated_blocks(fullgraph=True)` does it: one graph for all."""
    backend = Counting()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    cached = cache_of(model)
    with no_recompile():
        for prompt in (0, 1):
            for computes, inputs in generation(TOY, STEPS, prompt=prompt):
                same = torch.equal(cached(**inputs), make(ToyDiT)(**inputs))
                assert same == computes
    assert backend.count == 1
    assert breaks() == 0


def test_repeated_blocks_of_a_diffusers_model() -> None:
    from tests.zoo import case, flat

    wan = case("WanTransformer3DModel")
    model = wan.build()
    backend = Counting()
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    cached = cache_of(model)
    plain = wan.build()
    with no_recompile():
        for prompt in (0, 1):
            for index, inputs in enumerate(calls_of(wan, prompt=prompt)):
                same = torch.equal(flat(cached(**inputs)), flat(plain(**inputs)))
                assert same == (index in STEPS)
    assert (backend.count, breaks()) == (1, 0)
    assert all(block._compiled_call_impl is not None for block in model.blocks)


def test_compiled_blocks_within_a_compiled_model(model: nn.Module) -> None:
    inner, outer = Counting(), Counting()
    for block in model.blocks:
        block.compile(backend=inner, fullgraph=True)
    cached = cache_of(model)
    compiled_model = compiled(cached, outer)
    want = ByHand(make(ToyDiT), ["blocks"])
    with no_recompile():
        follows(compiled_model, want, generation(TOY, STEPS))
    assert (outer.count, breaks()) == (1, 0)


# --- Inductor ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("name", "strategy", "options"),
    [
        ("FluxTransformer2DModel", "taylorcache", {"no_cache_steps": STEPS}),
        pytest.param(
            "DiTTransformer2DModel",
            "teacache",
            {"rel_l1_thresh": 2.0, "signal": "input"},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "OfficialHunyuanVideo15",
            "deepcache",
            {"no_cache_steps": STEPS},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_inductor(name: str, strategy: str, options: dict[str, Any]) -> None:
    from tests.compile.test_models import short
    from tests.zoo import case, flat

    model_case = case(name)
    model = short(model_case)
    eager, cached = (dit_cache_fx.apply(model, strategy, **options) for _ in range(2))
    compiled_model = compiled(cached, "inductor")
    with no_recompile():
        for prompt in (0, 1):
            for inputs in calls_of(model_case, prompt=prompt):
                want, got = flat(eager(**inputs)), flat(compiled_model(**inputs))
                assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
            assert actions(cached) == actions(eager)
    assert breaks() == 0
