"""`compile_steps`: the graph of each kind of step is compiled by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import InvalidBackend

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.compile.compiling import (
    RULE,
    SCHEDULED,
    STEPS,
    STRATEGIES,
    Counting,
    assert_same,
    breaks,
    calls_of,
    compiled,
    no_recompile,
)
from tests.compile.test_calls import text_of
from tests.compile.test_changes import DYNAMOS_OWN, BreakingDiT
from tests.compile.test_models import PROMPTS, short
from tests.toys import DIM, TOY, ByHand, ToyDiT, actions, follows, generation, make, new, toy_inputs
from tests.zoo import CASES, Case


def cache_of(model: nn.Module, **options: Any) -> CachedModel:
    """With the graphs of its steps compiled."""
    cached: CachedModel = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    cached.compile_steps(**options)
    return cached


@pytest.fixture
def model() -> nn.Module:
    return make(ToyDiT)


#: what runs by default; `-m exhaustive` has the others
USUAL = {
    "DiTTransformer2DModel": "teacache",
    "FluxTransformer2DModel": "taylorcache",
    "WanTransformer3DModel": "rule",
}


def _matrix() -> Iterator[Any]:
    for case in CASES:
        for name, (strategy, options) in STRATEGIES.items():
            marks = () if USUAL.get(case.name) == name else pytest.mark.exhaustive
            yield pytest.param(case, strategy, options, id=f"{case.name}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "strategy", "options"), [*_matrix()])
def test_every_model(case: Case, strategy: str, options: dict[str, Any]) -> None:
    model, backend = short(case), Counting()
    eager = dit_cache_fx.apply(model, strategy, **options)
    cached = dit_cache_fx.apply(model, strategy, **options)
    cached.compile_steps(backend=backend, fullgraph=True)
    with no_recompile():
        for prompt in PROMPTS:
            assert_same(cached, eager, calls_of(case, prompt=prompt))
            assert actions(cached) == actions(eager)
            assert {*actions(cached)} == {"C", "r"}
    captures = len(eager.cache_report().captures)
    assert (backend.count, breaks()) == (captures * (3 if options == RULE[1] else 2), 0)


def test_a_reused_step_knows_the_parameters_of_what_it_runs(model: nn.Module) -> None:
    """So Dynamo has no guards on the others."""
    backend = Counting()
    follows(cache_of(model, backend=backend), ByHand(model, ["blocks"]), generation(TOY, STEPS))
    computed, reused = (
        {n.name for n in gm.graph.nodes if n.op == "placeholder" and "parameters" in n.name}
        for gm in backend.graphs
    )
    assert len(computed) == len([*model.parameters()])
    assert len(reused) == len([*model.head.parameters()]) == 2


def test_branches_of_cfg_and_resolutions(model: nn.Module) -> None:
    backend = Counting()
    cached, by_hand = cache_of(model, backend=backend, fullgraph=True), ByHand(model, ["blocks"])
    texts = {name: text_of(name) for name in ("cond", "uncond")}
    with no_recompile():
        for size in (0, 1, 0):
            for computes, inputs in generation(TOY, STEPS, size=size):
                for name, text in texts.items():
                    given = inputs | {"text": text}
                    want = by_hand(computes, branch=name, **given)
                    assert torch.equal(cached(**given), want)
    assert (backend.count, breaks()) == (4, 0)


def test_disabled_it_is_the_model_and_enabled_it_caches_again(model: nn.Module) -> None:
    cached = cache_of(model, backend="eager")
    cached.disable()
    assert torch.equal(cached(**toy_inputs(1000.0)), model(**toy_inputs(1000.0)))
    cached.enable()
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_other_weights_and_layers_take_effect(model: nn.Module) -> None:
    cached = cache_of(model, backend="eager")
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    with torch.no_grad():
        model.blocks[0].mix.weight.mul_(2)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    model.blocks[1].mix, model.head = new(nn.Linear, DIM, DIM), new(nn.Linear, DIM, DIM, seed=6)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))


def test_within_a_compiled_model_there_is_one_graph(model: nn.Module) -> None:
    """`torch.compile` goes before."""
    separate, whole = Counting(), Counting()
    cached = cache_of(model, backend=separate)
    compiled_model = compiled(cached, whole)
    with no_recompile():
        follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert (separate.count, whole.count) == (0, 1)


def test_blocks_with_a_break_are_compiled_one_by_one() -> None:
    model = make(BreakingDiT)
    torch.compile(model, backend="eager")(**toy_inputs(1000.0))
    own = breaks()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cached = cache_of(model, backend="eager")
    for prompt in (0, 1):
        follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS, prompt=prompt))
        assert actions(cached) == "CrCCrr"
    assert 0 < breaks() <= own + 1  # the first try for one graph


def test_a_break_raises_with_fullgraph() -> None:
    cached = cache_of(make(BreakingDiT), backend="eager", fullgraph=True)
    with pytest.raises(DYNAMOS_OWN, match="graph_break"):
        cached(**toy_inputs(1000.0))
    assert actions(cached) == ""


def test_options_are_refused_where_torch_compile_refuses_them(model: nn.Module) -> None:
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    for options, error in (
        ({"backend": "no-such-backend"}, InvalidBackend),
        ({"mode": "no-such-mode"}, RuntimeError),
        ({"no_such_option": 1}, TypeError),
    ):
        with pytest.raises(error):
            cached.compile_steps(**options)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))  # as it was


def test_a_copy_is_compiled_too(model: nn.Module) -> None:
    backend = Counting()
    copied = copy.copy(cache_of(model, backend=backend))
    follows(copied, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert backend.count == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning:torch")
def test_inductor(model: nn.Module) -> None:
    eager = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS)
    cached.compile_steps(fullgraph=True)
    with no_recompile():
        for prompt in (0, 1):
            for inputs in calls_of(TOY, prompt=prompt):
                torch.testing.assert_close(cached(**inputs), eager(**inputs), rtol=1e-4, atol=1e-4)
            assert actions(cached) == actions(eager)
    assert breaks() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("strategy", "options"), [*SCHEDULED.values(), RULE])
def test_cuda_graphs(strategy: str, options: dict[str, Any]) -> None:
    def on_gpu(**inputs: Tensor) -> dict[str, Tensor]:
        return {name: value.cuda() for name, value in inputs.items()}

    model = make(ToyDiT).cuda()
    eager, cached = (dit_cache_fx.apply(model, strategy, **options) for _ in range(2))
    cached.compile_steps(mode="reduce-overhead")
    texts = [text_of(name).cuda() for name in ("cond", "uncond")]
    for _ in range(3):
        for inputs in calls_of(TOY):
            calls = [on_gpu(**inputs) | {"text": text} for text in texts]
            got = [cached(**call) for call in calls]
            for result, call in zip(got, calls, strict=True):
                torch.testing.assert_close(result, eager(**call), rtol=1e-3, atol=1e-3)
