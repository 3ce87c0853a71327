"""A signal of zeros, infinities or NaNs: such a step computes, and the rule recovers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import DeepCache, FirstBlockCache, Strategy, TeaCache
from dit_cache_fx.export import export
from tests.compile.compiling import new_compiler
from tests.dynamo.inner import Inner
from tests.toys import DIM, TOKENS, ToyDiT, actions, make, rows

__all__ = ["new_compiler"]

NAN, INF = math.nan, math.inf
#: the gain at some of nine steps, and what the steps do then
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


class Gain(nn.Module):
    """What stands between the sample, which is well, and the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.gain: Tensor
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def model() -> nn.Module:
    """The sample times the gain is the first block's input."""
    toy = make(ToyDiT)
    toy.embed = Gain()  # type: ignore[assignment]
    return toy


def calls() -> list[dict[str, Tensor]]:
    x, text = rows("x", 0, (TOKENS, DIM), 1, torch.float32), torch.ones(1, 4, DIM)
    return [
        {"x": x * (1 + i / 100), "timestep": torch.tensor([900.0 - i]), "text": text}
        for i in range(9)
    ]


def generate(
    called: Callable[..., Tensor], toy: nn.Module, factors: dict[int, float]
) -> list[Tensor]:
    """Nine steps, at some of which the gain is another."""
    outputs = []
    for i, inputs in enumerate(calls()):
        toy.embed.gain.fill_(factors.get(i, 1.0))  # type: ignore[union-attr, operator]
        outputs.append(called(**inputs))
    return outputs


@dataclass(frozen=True, kw_only=True)
class Change(DeepCache):
    """A rule of somebody's own that keeps the signal alone, and says nothing of its measure."""

    @property
    def has_rule(self) -> bool:
        return True

    def looks_at(self) -> str:
        return "input"

    def init_state(self, signal: Tensor) -> Any:
        return (signal,)

    def should_compute(self, signal: Tensor, state: Any, forced: Tensor) -> Any:
        return forced | ((signal - state[0]).abs().mean() > 20.0), (signal,)


@dataclass(frozen=True, kw_only=True)
class Both(Change):
    """The same rule, of several signals."""

    def looks_at(self) -> tuple[str, ...]:  # type: ignore[override]
        return "distance", "input"

    def init_state(self, signal: Any) -> Any:
        return (signal[1],)

    def should_compute(self, signal: Any, state: Any, forced: Tensor) -> Any:
        return super().should_compute(signal[1], state, forced)


def teacache() -> Strategy:
    return TeaCache(rel_l1_thresh=20.0, signal="input")


def done(strategy: Strategy, factors: dict[int, float], compiles: bool = False) -> str:
    """What the steps of a generation do, eagerly or in one graph."""
    toy = model()
    cached = dit_cache_fx.apply(toy, strategy)
    one = torch.compile(cached, backend="eager", fullgraph=True) if compiles else cached
    generate(one, toy, factors)
    return actions(cached)


@pytest.mark.parametrize("case", CASES)
def test_eagerly(case: str) -> None:
    factors, expected = CASES[case]
    assert done(teacache(), factors) == expected


@pytest.mark.parametrize("case", ["a NaN", "an infinity", "an overflow", "NaN first"])
def test_a_rule_that_keeps_the_signal_alone(case: str) -> None:
    factors, expected = CASES[case]
    for compiles in (False, True):
        assert done(Change(), factors, compiles) == expected


@pytest.mark.parametrize("case", ["a zero", "zeros first", "a NaN", "an infinity", "NaN first"])
def test_in_one_graph(case: str) -> None:
    factors, expected = CASES[case]
    assert done(teacache(), factors, compiles=True) == expected


@pytest.mark.parametrize("case", ["a zero", "an infinity"])
def test_in_dynamos_graph(case: str) -> None:
    (factors, expected), toy = CASES[case], model()
    cache = dit_cache_fx.backend(teacache(), inner=Inner())
    generate(torch.compile(toy, backend=cache, fullgraph=True), toy, factors)
    assert "".join(r.action[0] for r in cache.cache_report().timeline) == expected.lower()


@pytest.mark.parametrize("strategy", [teacache, Change])
def test_in_an_exported_program(strategy: Any) -> None:
    toy = model()
    run = export(dit_cache_fx.apply(toy, strategy()), (), calls()[0]).runner()
    eager = dit_cache_fx.apply(toy, strategy())
    for case in ("a NaN", "an infinity", "NaN first", "none"):
        factors, expected = CASES[case]
        wanted = generate(eager, toy, factors)
        for i, (inputs, want) in enumerate(zip(calls(), wanted, strict=True)):
            x = inputs["x"] * factors.get(i, 1.0)  # its gain is a constant
            got = run(**inputs | {"x": x})
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
        assert actions(eager) == expected


def test_what_is_forced_stays_forced() -> None:
    strategy = TeaCache(rel_l1_thresh=20.0, signal="input", no_cache_steps={6})
    assert done(strategy, {3: NAN}) == "CrrCCrCrr"


def test_the_sum_goes_on_from_zero() -> None:
    """Behind a step without a measure the threshold is reached as from the start."""
    strategy = TeaCache(rel_l1_thresh=0.025, signal="input")
    assert done(strategy, {}) == "CrrCrrCrr"
    assert done(strategy, {1: NAN}) == "CCCrrCrrC"


#: as above; each computes where a number is missing and goes on behind it
RULES: dict[str, tuple[Strategy, str]] = {
    "first blocks": (FirstBlockCache(threshold=0.5), "CrrCCrrrr"),
    "limited": (FirstBlockCache(threshold=0.5, max_reused=5), "CrrCCrrrC"),
    "a tuple of signals": (Both(), "CrrCCrrrr"),
}


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_other_rules(rule: str, compiles: bool) -> None:
    strategy, expected = RULES[rule]
    for value in (NAN, INF):
        assert done(strategy, {3: value}, compiles) == expected
