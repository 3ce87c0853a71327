"""The same rules in one graph, in a graph for each kind of step, behind `backend()`, exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx.export import export
from tests.compile.compiling import (
    Counting,
    assert_same,
    breaks,
    compiled,
    new_compiler,
    no_recompile,
)
from tests.strategies.recorded import actions, calls, model
from tests.toys import InPlaceCodeDiT, InPlaceDiT, JoinedDiT, UnchangedDiT, make

__all__ = ["new_compiler"]

#: on the recorded run each computes on some steps and not on others
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "first block": ("firstblockcache", {"threshold": 0.4}),
    "both ends": (
        "dbcache",
        {"threshold": 0.6, "last_blocks": 1, "max_reused_in_a_row": 2, "warmup_steps": 3},
    ),
    "magnitudes": ("magcache", {"mag_ratios": [1.02] * 24, "num_steps": 10}),
    "rate": ("easycache", {"threshold": 0.8, "warmup_steps": 2, "num_steps": 10}),
    "tolerance": ("taylorcache", {"tolerance": 0.05, "max_order": 1, "num_steps": 10}),
    "tolerance, timesteps known": (
        "newtoncache",
        {"tolerance": 0.05, "timesteps": [1000.0 - 6 * i for i in range(10)]},
    ),
}
GIVEN = calls(10, span=60.0)


def cached_model(rule: str, kind: type[nn.Module] | None = None) -> dit_cache_fx.CachedModel:
    strategy, options = RULES[rule]
    return dit_cache_fx.apply(model() if kind is None else make(kind), strategy, **options)


@pytest.mark.parametrize("rule", RULES)
def test_one_graph(rule: str) -> None:
    eager, cached, backend = cached_model(rule), cached_model(rule), Counting()
    assert_same(compiled(cached, backend), eager, GIVEN[:2])
    with no_recompile():
        assert_same(compiled(cached, backend), eager, GIVEN[2:])
        assert_same(compiled(cached, backend), eager, GIVEN)
    assert actions(cached) == actions(eager)
    assert set(actions(eager)) == {"C", "r"}
    assert (backend.count, breaks()) == (1, 0)
    assert backend.calls(torch.ops.higher_order.cond) == 1


@pytest.mark.parametrize("rule", ["first block", "both ends"])
@pytest.mark.parametrize("kind", [JoinedDiT, UnchangedDiT])
def test_one_graph_where_blocks_return_several_tensors_or_their_input(
    rule: str, kind: type[nn.Module]
) -> None:
    eager, cached, backend = cached_model(rule, kind), cached_model(rule, kind), Counting()
    assert_same(compiled(cached, backend), eager, GIVEN)
    assert backend.count == 1


@pytest.mark.parametrize("rule", ["first block", "magnitudes"])
def test_one_graph_where_blocks_change_their_input_in_place(rule: str) -> None:
    """What a block was given is known although it is not there any more."""
    eager, cached, backend = (
        cached_model(rule, InPlaceDiT),
        cached_model(rule, InPlaceDiT),
        Counting(),
    )
    assert_same(compiled(cached, backend), eager, GIVEN)
    assert set(actions(eager)) == {"C", "r"}


def test_a_last_block_that_always_runs_and_whose_result_the_model_changes() -> None:
    cached, plain = cached_model("both ends", InPlaceCodeDiT), make(InPlaceCodeDiT)
    for inputs in GIVEN[:3]:  # the warm-up
        assert torch.equal(cached(**inputs), plain(**inputs))


@pytest.mark.exhaustive
def test_one_graph_by_inductor() -> None:
    eager, cached = cached_model("first block"), cached_model("first block")
    backend = Counting("inductor")
    run = compiled(cached, backend)
    for inputs in GIVEN:
        assert torch.allclose(run(**inputs), eager(**inputs), rtol=1e-4, atol=1e-5)
    assert actions(cached) == actions(eager)
    assert backend.count == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_graph_for_each_kind_of_step(rule: str) -> None:
    eager, cached = cached_model(rule), cached_model(rule)
    cached.compile_steps(backend="eager")
    assert_same(cached, eager, GIVEN)
    assert actions(cached) == actions(eager)


@pytest.mark.parametrize("rule", RULES)
def test_behind_backend(rule: str) -> None:
    strategy, options = RULES[rule]
    cache = dit_cache_fx.backend(strategy, inner="eager", **options)
    eager = cached_model(rule)
    assert_same(compiled(model(), cache), eager, GIVEN)
    assert actions(cache) == actions(eager)


@pytest.mark.parametrize(
    "rule",
    [
        "both ends",
        pytest.param("rate", marks=pytest.mark.exhaustive),
        pytest.param("tolerance", marks=pytest.mark.exhaustive),
        "tolerance, timesteps known",
    ],
)
def test_exported(rule: str) -> None:
    """The rule is inside of the program, and its state goes in and out."""
    eager = cached_model(rule)
    runner = export(cached_model(rule), (), GIVEN[0]).runner()
    assert_same(runner, eager, GIVEN)
    assert_same(runner, eager, GIVEN)  # another generation
    assert set(actions(eager)) == {"C", "r"}


@pytest.mark.parametrize("rule", RULES)
def test_two_branches_decide_by_themselves(rule: str) -> None:
    """CFG as two calls a step: each is as it is alone."""
    texts: dict[str, Tensor] = {"cond": GIVEN[0]["text"], "uncond": 3 * GIVEN[0]["text"]}
    alone = {name: cached_model(rule) for name in texts}
    together = cached_model(rule)
    for inputs in GIVEN:
        for name, text in texts.items():
            given = inputs | {"text": text}
            with together.cache_context(name):
                got = together(**given)
            assert torch.equal(got, alone[name](**given))
