"""A signal of zeros, infinities or NaNs: such a step computes, and the rule recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import DeepCache, Strategy, TeaCache
from dit_cache_fx.export import export
from tests.backend.inner import Inner
from tests.compile.compiling import new_compiler
from tests.toys import DIM, TOKENS, ToyDiT, actions, make, rows

__all__ = ["new_compiler"]

NAN, INF = math.nan, math.inf
#: what the sample is multiplied by at some of nine steps, and what the steps do then
CASES: dict[str, tuple[dict[int, float], str]] = {
    "none": ({}, "Crrrrrrrr"),
    "a zero": ({3: 0.0}, "CrrrCrrrr"),
    "zero first": ({0: 0.0}, "CCrrrrrrr"),
    "zeros first": ({0: 0.0, 1: 0.0}, "CCCrrrrrr"),
    "a NaN": ({3: NAN}, "CrrCCrrrr"),
    "an infinity": ({3: INF}, "CrrCCrrrr"),
    "two infinities": ({3: INF, 4: -INF}, "CrrCCCrrr"),
    "NaN first": ({0: NAN}, "CCrrrrrrr"),
    "an overflow": ({3: 3e38}, "CrrCCrrrr"),
    "NaNs": (dict.fromkeys(range(9), NAN), "CCCCCCCCC"),
}


def model() -> nn.Module:
    """The sample itself is the first block's input."""
    toy = make(ToyDiT)
    with torch.no_grad():
        toy.embed.weight.copy_(torch.eye(DIM))
        toy.embed.bias.zero_()
    return toy


def calls(factors: dict[int, float]) -> list[dict[str, Tensor]]:
    x, text = rows("x", 0, (TOKENS, DIM), 1, torch.float32), torch.ones(1, 4, DIM)
    return [
        {
            "x": x * (1 + i / 100) * factors.get(i, 1.0),
            "timestep": torch.tensor([900.0 - i]),
            "text": text,
        }
        for i in range(9)
    ]


@dataclass(frozen=True, kw_only=True)
class Change(DeepCache):
    """A rule of somebody's own that keeps the signal alone, and says nothing of its measure."""

    @property
    def has_rule(self) -> bool:
        return True

    def looks_at(self) -> str:
        return "input"

    def begin(self, signal: Tensor) -> Any:
        return (signal,)

    def decide(self, signal: Tensor, memory: Any, forced: Tensor) -> Any:
        return forced | ((signal - memory[0]).abs().mean() > 20.0), (signal,)


def teacache() -> Strategy:
    return TeaCache(rel_l1_thresh=20.0, signal="input")


@pytest.mark.parametrize("case", CASES)
def test_eagerly(case: str) -> None:
    factors, expected = CASES[case]
    cached = dit_cache_fx.apply(model(), teacache())
    for inputs in calls(factors):
        cached(**inputs)
    assert actions(cached) == expected


@pytest.mark.parametrize("case", ["a NaN", "an infinity", "an overflow", "NaN first"])
def test_a_rule_that_keeps_the_signal_alone(case: str) -> None:
    factors, expected = CASES[case]
    for run in (lambda c: c, lambda c: torch.compile(c, backend="eager", fullgraph=True)):
        cached = dit_cache_fx.apply(model(), Change())
        called = run(cached)
        for inputs in calls(factors):
            called(**inputs)
        assert actions(cached) == expected


@pytest.mark.parametrize("case", ["a zero", "zeros first", "a NaN", "an infinity", "NaN first"])
def test_in_one_graph(case: str) -> None:
    factors, expected = CASES[case]
    cached = dit_cache_fx.apply(model(), teacache())
    compiled = torch.compile(cached, backend="eager", fullgraph=True)
    for inputs in calls(factors):
        compiled(**inputs)
    assert actions(cached) == expected


@pytest.mark.parametrize("case", ["a zero", "an infinity"])
def test_in_dynamos_graph(case: str) -> None:
    factors, expected = CASES[case]
    cache = dit_cache_fx.backend(teacache(), inner=Inner())
    compiled = torch.compile(model(), backend=cache, fullgraph=True)
    for inputs in calls(factors):
        compiled(**inputs)
    assert "".join(r.action[0] for r in cache.cache_report().timeline) == expected.lower()


@pytest.mark.parametrize("strategy", [teacache, Change])
def test_in_an_exported_program(strategy: Any) -> None:
    toy = model()
    program = export(dit_cache_fx.apply(toy, strategy()), (), calls({})[0])
    run, eager = program.runner(), dit_cache_fx.apply(toy, strategy())
    for case in ("a NaN", "an infinity", "NaN first", "none"):
        for inputs in calls(CASES[case][0]):
            got, want = run(**inputs), eager(**inputs)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
        assert actions(eager) == CASES[case][1]


def test_what_is_forced_stays_forced() -> None:
    strategy = TeaCache(rel_l1_thresh=20.0, signal="input", no_cache_steps={6})
    cached = dit_cache_fx.apply(model(), strategy)
    for inputs in calls({3: NAN}):
        cached(**inputs)
    assert actions(cached) == "CrrCCrCrr"


def test_the_sum_goes_on_from_zero() -> None:
    """Behind a step without a measure the threshold is reached as from the start."""
    cached = dit_cache_fx.apply(model(), TeaCache(rel_l1_thresh=0.025, signal="input"))
    for inputs in calls({}):
        cached(**inputs)
    assert actions(cached) == "CrrCrrCrr"
    cached.clear_states()
    for inputs in calls({1: NAN}):
        cached(**inputs)
    assert actions(cached) == "CCCrrCrrC"
