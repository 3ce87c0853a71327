"""What a rule of one's own is made of, and its methods' old names."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import (
    Clock,
    DeepCache,
    DitCacheWarning,
    OptionError,
    RuleState,
    Strategy,
    TeaCache,
)
from tests.strategies.recorded import actions, calls, model, run, samples_and_outputs, streams

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclass(frozen=True, kw_only=True)
class Ruled(DeepCache):
    """Computes every third step, by a rule that looks at what a subclass says."""

    @property
    def has_rule(self) -> bool:
        return True

    def init_state(self, signal: Any) -> RuleState:
        return (torch.zeros(()),)

    def should_compute(
        self, signal: Any, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        now = state[0] + 1
        compute = forced | (now >= 3)
        return compute, (torch.where(compute, 0.0, now),)


# --- what a rule looks at ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looking(Ruled):
    names: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", [])

    def looks_at(self) -> str | tuple[str, ...]:
        return self.names

    def always_runs(self, position: int, blocks: int) -> bool:
        return position < 2 and "residual" in self.names

    def measure(self, cached: Any, value: Tensor, run_input: Any, clock: Clock) -> Tensor | None:
        return value.sum()[None] if "measured" in self.names else None

    def should_compute(
        self, signal: Any, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        self.seen.append(signal)  # type: ignore[attr-defined]
        return super().should_compute(signal, state, forced)


def looked(names: str | tuple[str, ...]) -> list[Any]:
    strategy = Looking(names=names)
    cached = dit_cache_fx.apply(model(), strategy)
    run(cached)
    assert actions(cached) == "Crr" * 8
    return strategy.seen  # type: ignore[attr-defined,no-any-return]


def test_the_residual_of_the_first_blocks() -> None:
    want = [after - before for before, after in streams(2)]
    assert all(map(torch.equal, looked("residual"), want[1:]))


def test_the_sample() -> None:
    want = [sample for sample, _ in samples_and_outputs()]
    assert all(map(torch.equal, looked("sample"), want[1:]))


def test_the_clock_and_what_was_measured() -> None:
    seen = looked(("measured", "distance", "computed"))
    sums = [after.sum().item() for _, after in streams(4)]
    want = [(sums[3 * ((i - 1) // 3)], (i - 1) % 3 + 1, (i - 1) // 3 + 1) for i in range(1, 24)]
    for (measured, distance, computed), (total, steps, before) in zip(seen, want, strict=True):
        assert measured.shape == (1, 1)
        assert measured.item() == pytest.approx(total, rel=1e-6)
        assert (distance.item(), computed.item()) == (steps, before)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("nonsense", r"looks_at\(\)='nonsense': of \['modulated', .*got \['nonsense'\]"),
        (("sample", "input"), r"looks_at\(\)=\('sample', 'input'\): at most one of"),
    ],
)
def test_names_that_cannot_be_looked_at(names: Any, text: str) -> None:
    cached = dit_cache_fx.apply(model(), Looking(names=names))
    with pytest.raises(OptionError, match=text):
        cached(**calls()[0])


def test_a_rule_whose_first_blocks_do_not_run_has_no_residual() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nowhere(Ruled):
        def looks_at(self) -> str:
            return "residual"

    cached = dit_cache_fx.apply(model(), Nowhere())
    with pytest.raises(dit_cache_fx.CaptureError, match="no block at the model's head always runs"):
        cached(**calls()[0])


# --- old names --------------------------------------------------------------------------------


def test_methods_of_old_names_work_with_one_warning() -> None:
    with pytest.warns(DitCacheWarning) as caught:

        @dataclass(frozen=True, kw_only=True)
        class Old(DeepCache):
            @property
            def has_rule(self) -> bool:
                return True

            def begin(self, signal: Tensor) -> Any:
                return (torch.zeros(()),)

            def decide(self, signal: Tensor, memory: Any, forced: Tensor) -> Any:
                now = memory[0] + 1
                compute = forced | (now >= 3)
                return compute, (torch.where(compute, 0.0, now),)

            def measured(self, memory: Any) -> Tensor:
                return memory[0]

    text = "begin is now init_state, decide is now should_compute, measured is now metric"
    assert [str(w.message) for w in caught] == [f"Old has old names, which will be removed: {text}"]
    cached = dit_cache_fx.apply(model(), Old())
    run(cached)
    assert actions(cached) == "Crr" * 8
    assert [r.measured for r in cached.cache_report().timeline[:4]] == [0.0, 1.0, 2.0, 0.0]


def test_the_old_name_of_reads_run_input_works_with_one_warning() -> None:
    with pytest.warns(DitCacheWarning) as caught:

        @dataclass(frozen=True, kw_only=True)
        class Old(DeepCache):
            reads_start: ClassVar[bool] = True

            def store(self, cached: Any, value: Tensor, run_input: Any, clock: Clock) -> Any:
                return [value - run_input]

            def reuse(self, cached: Any, run_input: Any, clock: Clock) -> Tensor:
                return run_input + cached[0]  # type: ignore[no-any-return]

    text = "Old has old names, which will be removed: reads_start is now reads_run_input"
    assert [str(w.message) for w in caught] == [text]
    old = dit_cache_fx.apply(model(), Old(no_cache_steps=[0]))
    new = dit_cache_fx.apply(model(), TeaCache(no_cache_steps=[0]))
    for call in calls()[:2]:
        assert torch.equal(old(**call), new(**call))


def test_an_old_method_reaches_the_one_that_it_replaces() -> None:
    """`super()` has both names, and each class warns once."""
    seen: list[float] = []
    with pytest.warns(DitCacheWarning, match="Watched has .*: decide is now should_compute$"):

        @dataclass(frozen=True, kw_only=True)
        class Watched(TeaCache):
            def decide(self, signal: Tensor, memory: Any, forced: Tensor) -> Any:
                compute, state = super().decide(signal, memory, forced)  # type: ignore[misc]
                seen.append(state[2].item())
                return compute, state

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclass(frozen=True, kw_only=True)
        class Below(Watched):
            pass

    cached = dit_cache_fx.apply(model(), Below(rel_l1_thresh=0.5))
    run(cached)
    assert [r.measured for r in cached.cache_report().timeline[1:]] == pytest.approx(seen)


def test_new_names_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclass(frozen=True, kw_only=True)
        class New(Ruled):
            def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
                return state[0] if state else None

    assert issubclass(New, Strategy)
