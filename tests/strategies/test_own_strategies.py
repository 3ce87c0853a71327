"""A user's strategy is checked when it is traced, its rule when it is asked: errors say what."""

# ruff: noqa: ARG005

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import Strategy, VerifyError
from tests.compile.compiling import new_compiler
from tests.toys import TOY, ByHand, ToyDiT, actions, follows, generation, make, toy_inputs

__all__ = ["new_compiler"]

STEPS = frozenset({0, 3})


@dataclass(frozen=True, kw_only=True)
class Own(Strategy):
    """Holds the value; tests replace parts of it."""

    def store(self, cached: Any, value: Tensor, run_input: Any, clock: Any) -> Any:
        return [value]

    def reuse(self, cached: Any, run_input: Any, clock: Any) -> Any:
        return cached[0]


def own(name: str, function: Callable[..., Any], **more: Any) -> Strategy:
    return type(name, (Own,), {"__annotations__": {}, **more, function.__name__: function})(
        no_cache_steps=STEPS
    )


def refusal(strategy: Strategy, check: bool = True) -> str:
    cached = dit_cache_fx.apply(make(ToyDiT), strategy, check=check)
    with pytest.raises(VerifyError) as caught:
        cached(**toy_inputs(900.0))
    return str(caught.value)


SPEC = "torch.float32[1, 6, 8] on cpu"


def _store(result: Callable[..., Any]) -> Callable[..., Any]:
    def store(self: Any, cached: Any, value: Any, run_input: Any, clock: Any) -> Any:
        return result(cached, value, clock)

    return store


def _reuse(result: Callable[..., Any]) -> Callable[..., Any]:
    def reuse(self: Any, cached: Any, run_input: Any, clock: Any) -> Any:
        return result(cached, clock)

    return reuse


REFUSED = {
    "dtype": (
        _store(lambda cached, value, clock: [value.double()]),
        ["store gave torch.float64[1, 6, 8] on cpu", f"expected {SPEC}", "slots()"],
    ),
    "shape": (
        _store(lambda cached, value, clock: [value.mean(1, keepdim=True)]),
        ["store gave torch.float32[1, 1, 8] on cpu", f"expected {SPEC}"],
    ),
    "one too many": (
        _store(lambda cached, value, clock: [value, value]),
        ["store gave 2 tensors, 1 expected: as many as slots()"],
    ),
    "no list": (_store(lambda cached, value, clock: value), ["store gave torch.float32[1, 6, 8]"]),
    "nothing": (_store(lambda cached, value, clock: None), ["store gave NoneType None"]),
    "changes value": (
        _store(lambda cached, value, clock: [value.add_(1)]),
        ["store changes value in place", "x.add_(1)"],
    ),
    "changes a view": (
        _store(lambda cached, value, clock: [value, value[:, 0].zero_()][:1]),
        ["store changes value in place"],
    ),
    "changes cached": (
        _reuse(lambda cached, clock: cached[0].mul_(0.9)),
        ["reuse changes cached[0] in place"],
    ),
    "changes the clock": (
        _reuse(lambda cached, clock: cached[0] + clock.distance.add_(1)),
        ["reuse changes clock.distance in place"],
    ),
    "branches": (
        _reuse(lambda cached, clock: cached[0] if clock.distance < 2 else cached[0] * 0.5),
        ["reuse reads a value from a tensor", "clock", "torch.where"],
    ),
    "reads": (
        _reuse(lambda cached, clock: cached[0] * float(clock.computed)),
        ["reuse reads a value from a tensor"],
    ),
    "reuse dtype": (
        _reuse(lambda cached, clock: cached[0].half()),
        ["reuse gave torch.float16[1, 6, 8] on cpu", f"expected {SPEC}", "the value"],
    ),
    "reuse list": (
        _reuse(lambda cached, clock: [cached[0]]),
        ["reuse gave list", f"expected {SPEC}"],
    ),
    "fails": (
        _store(lambda cached, value, clock: [value @ value]),
        ["store raises RuntimeError", f"cached[0]: {SPEC}"],
    ),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_a_function_that_cannot_work_is_refused_by_name(case: str, check: bool) -> None:
    function, texts = REFUSED[case]
    told = refusal(own("Mine", function), check)
    for text in ["in pass guard_runs: strategy Mine: ", *texts]:
        assert text in told


def test_in_place_operations_on_tensors_of_its_own_are_fine() -> None:
    def reuse(self: Any, cached: Any, run_input: Any, clock: Any) -> Any:
        total = cached[0].clone()
        total[:, :1].add_(0.0)
        total += cached[0]
        return total.mul_(0.5)

    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, own("Mine", reuse))
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert actions(cached) == "CrrCrr"


def test_a_strategy_may_hold_nothing() -> None:
    def store(self: Any, cached: Any, value: Any, run_input: Any, clock: Any) -> Any:
        return []

    def reuse(self: Any, cached: Any, run_input: Any, clock: Any) -> Any:
        return run_input

    told = own("Skips", store, slots=lambda self: 0, reuse=reuse, reads_run_input=True)
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, told)
    for computes, inputs in generation(TOY, STEPS):
        c = model.condition(inputs["timestep"], inputs["text"])
        h = model.embed(inputs["x"])
        want = model.head(model.trunk(h, c) if computes else h)
        assert torch.equal(cached(**inputs), want)


class _LongerRun(ToyDiT):
    """The last block runs on twice as many tokens."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        tokens = h.shape[1]
        h = self.blocks[1](self.blocks[0](h, c), c)
        return self.blocks[2](torch.cat([h, 2 * h], dim=1), c)[:, tokens:]


def test_constants_of_each_function_and_run_are_its_own() -> None:
    """They are called the same in the graphs of `store` and `measure`, and in those of two runs."""

    def weights(value: Tensor) -> Tensor:
        return torch.tensor([2.0**i for i in range(value.shape[1])])[:, None]

    def store(self: Any, held: Any, value: Any, start: Any, clock: Any) -> Any:
        return [value * weights(value)]

    def measure(self: Any, held: Any, value: Any, start: Any, clock: Any) -> Any:
        return value.mean().reshape(1) * torch.tensor([0.5])

    def reuse(self: Any, held: Any, start: Any, clock: Any) -> Any:
        return held[0] / weights(held[0])

    told = type(own("Weighted", store)).__mro__[0]
    strategy = type("Weighted", (told,), {"measure": measure, "reuse": reuse})(
        no_cache_steps=STEPS, no_cache_block_id={"blocks": {1}}
    )
    model = make(_LongerRun)
    cached = dit_cache_fx.apply(model, strategy)
    by_hand = ByHand(model, ["blocks"], never=["blocks.1"])
    follows(cached, by_hand, generation(TOY, STEPS))
    assert actions(cached) == "CrrCrr"


# --- rules ------------------------------------------------------------------------------------


class Ruled(Own):
    """Computes where the signal's mean has changed by more than a half."""

    has_rule = True  # type: ignore[assignment]

    def looks_at(self) -> str:
        return "input"

    def init_state(self, signal: Tensor) -> Any:
        return (signal.mean(),)

    def should_compute(self, signal: Tensor, state: Any, forced: Tensor) -> Any:
        mean = signal.mean()
        return forced | ((mean - state[0]).abs() > 0.5), (mean,)


def ruled(name: str, function: Callable[..., Any]) -> Strategy:
    return type(name, (Ruled,), {function.__name__: function})()


def _should_compute(result: Callable[..., Any]) -> Callable[..., Any]:
    def should_compute(self: Any, signal: Any, state: Any, forced: Any) -> Any:
        return result(signal, state, forced)

    return should_compute


def _init_state(result: Callable[..., Any]) -> Callable[..., Any]:
    def init_state(self: Any, signal: Any) -> Any:
        return result(signal)

    return init_state


REFUSED_RULES = {
    "no state": (
        _should_compute(lambda s, m, f: f),
        ["should_compute gave tensor(False)", "(computes, state)"],
    ),
    "float": (
        _should_compute(lambda s, m, f: (s.mean(), m)),
        ["should_compute gave torch.float32[] on cpu as its decision", "boolean"],
    ),
    "for each row": (
        _should_compute(lambda s, m, f: (s.mean((0, 2)) > 0, m)),
        ["should_compute gave torch.bool[6] on cpu as its decision"],
    ),
    "other state": (
        _should_compute(lambda s, m, f: (f, (s.double().mean(),))),
        ["should_compute gave torch.float64[] on cpu", "expected torch.float32[] on cpu"],
    ),
    "more state": (
        _should_compute(lambda s, m, f: (f, (*m, f))),
        ["should_compute gave 2 tensors, 1 expected"],
    ),
    "changes the signal": (
        _should_compute(lambda s, m, f: (s.add_(1).mean() > 0, m)),
        ["should_compute changes signal in place"],
    ),
    "changes its state": (
        _should_compute(lambda s, m, f: (f, (m[0].add_(1),))),
        ["should_compute changes state[0] in place"],
    ),
    "begins with a number": (
        _init_state(lambda s: 1.0),
        ["init_state gave 1.0", "a tuple of tensors"],
    ),
    "init_state changes": (
        _init_state(lambda s: (s.zero_(),)),
        ["init_state changes signal in place"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_RULES)
def test_a_rule_that_cannot_work_is_refused_by_name(case: str) -> None:
    function, texts = REFUSED_RULES[case]
    for run in (lambda c: c, lambda c: torch.compile(c, backend="eager", fullgraph=True)):
        cached = run(dit_cache_fx.apply(make(ToyDiT), ruled("Mine", function)))
        with pytest.raises(VerifyError) as caught:
            _two_steps(cached)
        for text in ["strategy Mine: ", *(t.replace("tensor(False)", "") for t in texts)]:
            assert text in str(caught.value)


def _two_steps(cached: Callable[..., Any]) -> None:
    for step in range(2):
        cached(**toy_inputs(900.0 - step))


def test_a_rule_that_branches_in_python_cannot_be_one_graph() -> None:
    def should_compute(self: Any, signal: Tensor, state: Any, forced: Tensor) -> Any:
        return forced | bool(signal.mean() > state[0]), state

    cached = dit_cache_fx.apply(make(ToyDiT), ruled("Mine", should_compute))
    for step in range(2):  # here each step asks it
        cached(**toy_inputs(900.0 - step))
    assert len(actions(cached)) == 2
    told = "strategy Mine: should_compute reads a value from a tensor"
    compiled = torch.compile(cached, backend="eager", fullgraph=True)
    with pytest.raises(VerifyError, match=told):
        compiled(**toy_inputs(800.0))
