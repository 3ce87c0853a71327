"""`backend()` on every model of the zoo, with every strategy, against the eager cached model.

Dynamo captures each model once; what it captures goes to a backend object for each strategy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from dit_cache_fx import Backend, DitCacheWarning
from tests.compile.compiling import STEPS, STRATEGIES, calls_of, no_recompile
from tests.zoo import CASES, Case, case, flat
from tests.zoo.representatives import marks_of

#: Dynamo breaks these in pieces by themselves
SPLIT = (
    "HunyuanVideo15Transformer3DModel",
    "OfficialHunyuanVideo15",
    "OfficialHunyuanVideo15Single",
    "ZImageTransformer2DModel",
)
WHOLE = [c for c in CASES if c.name not in SPLIT]
USUAL = ("DiTTransformer2DModel",)


class Together:
    """A backend that answers with the model's own graph, and notes what each cache answers."""

    def __init__(self, caches: dict[str, Backend]) -> None:
        self.caches = caches
        self.answers: dict[str, Any] = {}
        self.graphs = 0

    def __call__(self, gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        cached = {name: cache(gm, inputs) for name, cache in self.caches.items()}

        def run(*operands: Any) -> Any:
            self.answers = {name: graph(*operands) for name, graph in cached.items()}
            return gm(*operands)

        return run


def short(model_case: Case) -> nn.Module:
    """The model with two blocks in all: Dynamo's time goes by the blocks."""
    model = model_case.build()
    keep = 2 if len(model_case.block_lists) == 1 else 1
    for name in model_case.block_lists:
        del model.get_submodule(name)[keep:]
    return model


def caches_of(**options: Any) -> dict[str, Backend]:
    return {
        name: dit_cache_fx.backend(strategy, inner="eager", **own, **options)
        for name, (strategy, own) in STRATEGIES.items()
    }


def timeline(cached: Any) -> list[tuple[int, str]]:
    return [(record.step, record.action) for record in cached.cache_report().timeline]


@pytest.mark.parametrize(
    "model_case",
    [pytest.param(c, id=c.name, marks=marks_of(c.name, c.name in USUAL)) for c in WHOLE],
)
def test_every_strategy_gives_what_the_eager_cached_model_gives(model_case: Case) -> None:
    model = short(model_case)
    eager = {
        name: dit_cache_fx.apply(model, strategy, **options)
        for name, (strategy, options) in STRATEGIES.items()
    }
    together = Together(caches_of())
    compiled = torch.compile(model, backend=together, fullgraph=True)
    with no_recompile():
        for prompt in (0, 1):
            for inputs in calls_of(model_case, prompt=prompt):
                compiled(**inputs)
                for name, cached in eager.items():
                    want = flat(cached(**inputs))
                    got = flat(together.answers[name])
                    assert torch.equal(got.flatten(), want.flatten()), name
            for name, cached in eager.items():
                assert timeline(together.caches[name]) == timeline(cached), name
    assert together.graphs == 1
    for name, cached in eager.items():
        report, wanted = together.caches[name].cache_report(), cached.cache_report()
        assert report.blocks == wanted.blocks
        assert report.cached_blocks == wanted.cached_blocks
        assert report.bytes_held == wanted.bytes_held


@pytest.mark.parametrize(
    "name",
    [
        "OfficialHunyuanVideo15",
        pytest.param("ZImageTransformer2DModel", marks=pytest.mark.exhaustive),
    ],
)
def test_the_piece_with_the_blocks_is_cached(name: str) -> None:
    """The second step computes: only there it shows what varies of what a piece is given."""
    model_case = case(name)
    model = short(model_case)
    strategy, options = "taylorcache", {"no_cache_steps": STEPS | {1}}
    cached = dit_cache_fx.apply(model, strategy, **options)
    cache = dit_cache_fx.backend(strategy, inner="eager", **options)
    compiled = torch.compile(model, backend=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitCacheWarning)
        for inputs in calls_of(model_case, prompt=0):
            assert torch.equal(flat(compiled(**inputs)), flat(cached(**inputs)))
    reused = {step for step, action in timeline(cache) if action == "predicted"}
    assert reused
    assert reused == {step for step, action in timeline(cached) if action == "predicted"}


def test_a_model_whose_pieces_cannot_be_cached_is_as_it_was() -> None:
    model_case = case("HunyuanVideo15Transformer3DModel")
    model = short(model_case)
    strategy, options = STRATEGIES["deepcache"]
    cache = dit_cache_fx.backend(strategy, inner="eager", **options)
    compiled = torch.compile(model, backend=cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DitCacheWarning)
        for inputs in calls_of(model_case, prompt=0):
            assert torch.equal(flat(compiled(**inputs)), flat(model(**inputs)))
    (warning,) = [w for w in caught if issubclass(w.category, DitCacheWarning)]
    assert "no piece can be cached" in str(warning.message)
