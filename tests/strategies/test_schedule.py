"""Which steps compute: shares, presets, schedules of one's own, and the number of steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import (
    CachedModel,
    DeepCache,
    EvenAndLast,
    EvenSteps,
    OptionError,
    Schedule,
    TaylorCache,
)
from dit_cache_fx.lowering.stateful import fixed_steps
from dit_cache_fx.strategies.presets import PRESETS
from tests.test_errors import refused
from tests.toys import TOY, ToyDiT, actions, generation, make

pytestmark = pytest.mark.usefixtures("no_grad")


def steps_of(schedule: Schedule, steps: int, told: int | None = None) -> list[int]:
    return [step for step in range(steps) if schedule.computes(step, told)]


@dataclass(frozen=True)
class FirstAndLast(Schedule):
    """Needs the number of steps: without it nothing is known of the last one."""

    def computes(self, step: int, num_steps: int | None) -> bool:
        return num_steps is not None and step == num_steps - 1


def toy(strategy: Any = "deepcache", **options: Any) -> CachedModel:
    return dit_cache_fx.apply(make(ToyDiT), strategy, check=False, **options)


def run(cached: Any, steps: int) -> str:
    """What a generation of so many steps does: "C" for each computed step, else "r"."""
    for _, inputs in generation(TOY, (), steps=steps):
        cached(**inputs)
    return actions(cached)


# --- the sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1, range(12)),
        (1 / 2, [0, 2, 4, 6, 8, 10]),
        (1 / 3, [0, 3, 6, 9]),
        (0.4, [0, 3, 5, 8, 10]),
        (0.75, [0, 2, 3, 4, 6, 7, 8, 10, 11]),
        (0.01, [0]),
        (1e-9, [0]),
    ],
)
def test_a_share_is_evenly_spaced(ratio: float, expected: Sequence[int]) -> None:
    assert steps_of(EvenSteps(ratio), 12) == list(expected)
    assert steps_of(EvenSteps(ratio), 12, told=12) == list(expected)


@pytest.mark.parametrize("hundredths", [7, 10, 29, 30, 57, 90])
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 101])
def test_a_share_is_exact(hundredths: int, steps: int) -> None:
    """As a float 0.29 is less than 29 of 100, and the 30th of 101 steps would come late."""
    chosen = steps_of(EvenSteps(hundredths / 100), steps)
    assert len(chosen) == (steps - 1) * hundredths // 100 + 1


def test_gaps_differ_by_one_step_at_most() -> None:
    for ratio in (0.07, 0.3, 0.45, 0.9):
        steps = steps_of(EvenSteps(ratio), 300)
        gaps = {b - a for a, b in pairwise(steps)}
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [0]),
        (2, [0, 1]),
        (4, [0, 2, 3]),
        (5, [0, 3, 4]),
        (20, [0, 4, 8, 12, 16, 19]),
    ],
)
def test_more_steps_a_share_and_the_last(steps: int, expected: list[int]) -> None:
    schedule = EvenAndLast(0.2, more=2)
    assert steps_of(schedule, steps, told=steps) == expected
    assert steps_of(schedule, 60) == steps_of(EvenSteps(11 / 50), 60)


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 30, 50])
def test_presets_compute_less_the_faster_they_are(steps: int) -> None:
    counts = [len(steps_of(PRESETS[name], steps, told=steps)) for name in PRESETS]
    assert list(PRESETS) == ["quality", "balanced", "fast"]
    assert counts == sorted(counts, reverse=True)
    assert all(PRESETS[name].computes(0, told) for name in PRESETS for told in (None, steps))


# --- in a cached model --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["deepcache", "teacache", "taylorcache"])
def test_one_apply_serves_runs_of_any_length(strategy: str) -> None:
    cached = toy(strategy, compute_ratio=0.5)
    assert run(cached, 4) == "CrCr"
    assert run(cached, 7) == "CrCrCrC"
    assert run(cached, 1) == "C"


def test_a_share_is_the_same_as_its_steps_listed() -> None:
    model = make(ToyDiT)
    share, listed = (
        dit_cache_fx.apply(model, TaylorCache(**options))
        for options in ({"compute_ratio": 0.4}, {"no_cache_steps": {0, 3, 5}})
    )
    for _, inputs in generation(TOY, (), steps=6):
        assert torch.equal(share(**inputs), listed(**inputs))


def test_the_number_of_steps_as_an_option() -> None:
    cached = toy(schedule=FirstAndLast(), num_steps=4)
    assert cached.num_steps is None
    assert run(cached, 4) == "CrrC"
    assert cached.num_steps == 4


def test_the_number_of_steps_set_on_the_cached_model_goes_first() -> None:
    cached = toy(schedule=FirstAndLast(), num_steps=4)
    cached.num_steps = 3
    assert cached.num_steps == 3
    assert run(cached, 3) == "CrC"
    cached.num_steps = None
    assert run(cached, 4) == "CrrC"
    assert not hasattr(dit_cache_fx.cached_model.original(cached), "num_steps")


def test_the_number_of_steps_from_a_function_once_a_generation() -> None:
    told: list[int] = []
    lengths = iter([4, 3])

    def number() -> int:
        told.append(next(lengths))
        return told[-1]

    cached = toy(schedule=FirstAndLast(), num_steps=number)
    assert told == []
    assert run(cached, 4) == "CrrC"
    assert run(cached, 3) == "CrC"
    assert told == [4, 3]


def test_the_number_of_steps_is_counted_in_the_first_generation() -> None:
    cached = toy(schedule=FirstAndLast())
    assert run(cached, 4) == "Crrr"
    assert run(cached, 4) == "CrrC"
    cached.clear_states()  # as some loops do before each generation
    assert run(cached, 4) == "CrrC"
    cached.reset_states()
    assert run(cached, 4) == "Crrr"


def test_a_step_beyond_the_number_is_another_generation() -> None:
    cached = toy(schedule=EvenAndLast(0.4, more=0), num_steps=3)
    assert [run(cached, steps) for steps in (3, 4)] == ["CrC", "C"]


def test_a_number_that_was_counted_and_is_too_small_is_as_none() -> None:
    """After a broken-off generation, say: what is not known is not made up."""
    cached = toy(schedule=EvenAndLast(0.4, more=0))
    run(cached, 3)
    assert run(cached, 7) == "CrC" + "CrrC"


def test_branches_share_the_number_of_steps() -> None:
    cached = toy(schedule=FirstAndLast(), num_steps=iter_of(3, 2))
    for steps, expected in ((3, "CCrrCC"), (2, "CCCC")):
        for _, inputs in generation(TOY, (), steps=steps):
            for name in ("cond", "uncond"):
                with cached.cache_context(name):
                    cached(**inputs)
        assert actions(cached) == expected


def iter_of(*numbers: int) -> Any:
    """A function that gives these numbers one after the other, and no more."""
    return iter(numbers).__next__


def test_a_call_that_fails_starts_no_generation() -> None:
    cached = toy(schedule=FirstAndLast(), num_steps=iter_of(3, 3))
    first = generation(TOY, (), steps=3)[0][1]
    with pytest.raises(Exception, match="shapes"):
        cached(first["x"][..., :-1], first["timestep"], first["text"])
    assert run(cached, 3) == "CrC"


@pytest.mark.parametrize("value", [0, -3, None, 2.0, "4", True])
def test_a_function_that_gives_no_number(value: Any) -> None:
    numbers = [value, 3]
    cached = toy(schedule=FirstAndLast(), num_steps=lambda: numbers.pop(0))
    with pytest.raises(
        OptionError, match=r"num_steps\(\)=.*: the number of steps of a generation: an int"
    ):
        run(cached, 3)
    assert run(cached, 3) == "CrC"


def test_shares_and_rules_go_together() -> None:
    """What the schedule says is computed whatever TeaCache's rule says."""
    cached = toy("teacache", compute_ratio=0.5, rel_l1_thresh=1e9)
    assert run(cached, 6) == "CrCrCr"


def test_a_copy_has_the_schedule() -> None:
    cached = copy.deepcopy(toy(schedule=FirstAndLast(), num_steps=4))
    assert run(cached, 4) == "CrrC"


def test_a_strategy_of_ones_own_has_the_options() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(DeepCache):
        share: float = 1.0

    assert run(toy(Own(schedule="fast")), 6) == "CrrrrC"


def test_the_report_says_what_the_schedule_is() -> None:
    cached = toy(schedule="balanced", num_steps=12)
    run(cached, 12)
    report = cached.cache_report()
    assert (report.schedule, report.num_steps) == ("balanced", 12)
    assert "schedule: balanced, for 12 steps" in str(report)
    assert toy(compute_ratio=0.5).cache_report().schedule == "compute_ratio 0.5"
    assert toy(no_cache_steps={0, 2}).cache_report().schedule == ""
    assert toy("teacache", rel_l1_thresh=0.1).cache_report().schedule == ""


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"no_cache_steps": {0}, "compute_ratio": 0.5},
        {"no_cache_steps": (), "schedule": "fast"},
        {"compute_ratio": 0.5, "schedule": "fast"},
    ],
)
def test_two_schedules_at_once(options: dict[str, Any]) -> None:
    first, second = options
    refused(
        rf"{second}=.*: {first} is given too: pass one of \['no_cache_steps', 'compute_ratio', "
        r"'schedule', 'computed_steps'\]",
        make(ToyDiT),
        **options,
    )


@pytest.mark.parametrize("ratio", [0, -0.5, 1.1, 2, float("nan"), float("inf"), True, "0.5", [0.5]])
def test_ratios_that_are_no_share(ratio: Any) -> None:
    text = "a share of the steps above 0 and at most 1, such as 0.5"
    refused(rf"compute_ratio=.*: {text}", make(ToyDiT), compute_ratio=ratio)
    for kind in (EvenSteps, EvenAndLast):
        with pytest.raises(OptionError, match=rf"^ratio=.*: {text}"):
            kind(ratio)


@pytest.mark.parametrize("more", [-1, 1.5, True, None])
def test_more_steps_that_cannot_be(more: Any) -> None:
    with pytest.raises(OptionError, match=r"^more=.*: an integer from 0"):
        EvenAndLast(0.5, more=more)


@pytest.mark.parametrize("schedule", ["best", "", 0.5, {0, 1}, EvenSteps])
def test_schedules_that_there_are_not(schedule: Any) -> None:
    refused(
        r"schedule=.*: one of \['quality', 'balanced', 'fast'\], or a Schedule object",
        make(ToyDiT),
        schedule=schedule,
    )


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "50", [50]])
def test_numbers_of_steps_that_cannot_be(number: Any) -> None:
    text = r"num_steps=.*: the number of steps of a generation: an integer from 1"
    refused(text, make(ToyDiT), compute_ratio=0.5, num_steps=number)
    with pytest.raises(OptionError, match=text):
        toy(compute_ratio=0.5).num_steps = number


# --- where no host is: exported programs --------------------------------------------------------


def test_a_program_needs_the_number_where_the_schedule_does() -> None:
    schedule = EvenAndLast(0.5, more=0)
    strategy = DeepCache(schedule=schedule)
    with pytest.raises(OptionError, match=r"num_steps=None: EvenAndLast\(.*\) places its steps by"):
        fixed_steps(strategy, None)
    steps, until = fixed_steps(strategy, 6)
    assert steps[:3] == [0, 3, 5]
    assert steps[3:] == [s for s in range(6, 1000) if schedule.computes(s, None)]
    assert until == 1000


def test_a_program_of_a_share_or_a_list_needs_no_number() -> None:
    steps, until = fixed_steps(DeepCache(compute_ratio=0.2), None)
    assert (steps, until) == ([*range(0, 1000, 5)], 1000)
    assert fixed_steps(DeepCache(no_cache_steps={3, 1200}), None) == ([3, 1200], math.inf)


def test_an_exported_program_follows_the_schedule() -> None:
    cached = toy(schedule=EvenAndLast(0.4, more=0))
    run(cached, 5)
    run(cached, 5)  # counted by now; but a program would keep that number for ever
    first = generation(TOY, (), steps=5)[0][1]
    with pytest.raises(OptionError, match="num_steps=None"):
        dit_cache_fx.export(cached, kwargs=first)
    cached.num_steps = 5
    runner = dit_cache_fx.export(cached, kwargs=first).runner()
    cached.clear_states()
    for _, inputs in generation(TOY, (), steps=5):
        torch.testing.assert_close(runner(**inputs), cached(**inputs))
    assert actions(cached) == "CrrrC"
