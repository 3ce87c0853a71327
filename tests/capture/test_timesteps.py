"""Computed steps placed by timestep: what tells the timesteps, and where the steps come."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import dit_cache_fx
from dit_cache_fx import CachedModel, DeepCache, DitCacheWarning, EvenTimesteps, OptionError
from dit_cache_fx.lowering.stateful import fixed_steps
from dit_cache_fx.strategies.presets import PRESETS
from dit_cache_fx.strategies.schedule import ListedSteps, Schedule
from dit_cache_fx.strategies.timesteps import from_call, told_of
from tests.test_errors import refused
from tests.toys import PerTokenDiT, ToyDiT, actions, make, toy_inputs

pytestmark = pytest.mark.usefixtures("no_grad")


def shifted(steps: int, shift: float = 5.0, scale: float = 1000.0) -> list[float]:
    """The timesteps of a flow-matching sampler."""
    even = [1 - k / steps for k in range(steps)]
    return [scale * shift * u / (1 + (shift - 1) * u) for u in even]


def toy(strategy: Any = "deepcache", kind: type = ToyDiT, **options: Any) -> CachedModel:
    return dit_cache_fx.apply(make(kind), strategy, check=False, **options)


def run(cached: Any, timesteps: Sequence[float]) -> str:
    for step, timestep in enumerate(timesteps):
        cached(**toy_inputs(timestep, seed=step))
    return actions(cached)


def placed(schedule: Schedule, timesteps: Sequence[float]) -> list[int]:
    found = schedule.placed(timesteps)
    return [s for s in range(len(timesteps)) if found.computes(s, len(timesteps))]


def drawn(schedule: Schedule, timesteps: Sequence[float]) -> str:
    steps = placed(schedule, timesteps)
    return "".join("C" if s in steps else "r" for s in range(len(timesteps)))


# --- where the steps come -----------------------------------------------------------------------


@pytest.mark.parametrize("computed", [2, 3, 7, 10, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_each_step_is_the_nearest_to_its_place(computed: int, shift: float) -> None:
    timesteps = shifted(50, shift)
    steps = placed(EvenTimesteps(computed), timesteps)
    assert len(steps) == computed
    assert steps[0] == 0
    assert steps[-1] == 49
    if computed < 25:  # no two places have the same nearest step
        first, last = timesteps[0], timesteps[-1]
        places = [first + (last - first) * i / (computed - 1) for i in range(computed)]
        nearest = [min(range(50), key=lambda k: abs(timesteps[k] - p)) for p in places]
        assert steps == nearest


def test_known_places() -> None:
    timesteps = [10.0, 9.0, 8.0, 7.0, 6.0, 4.0, 0.0]
    assert placed(EvenTimesteps(3), timesteps) == [0, 4, 6]  # 10, 5 (6 and 4 are as near), 0
    assert placed(EvenTimesteps(1), timesteps) == [0]
    assert placed(EvenTimesteps(2), timesteps) == [0, 6]
    assert placed(EvenTimesteps(7), timesteps) == list(range(7))
    assert placed(EvenTimesteps(70), timesteps) == list(range(7))


def test_timesteps_that_go_up_or_are_scaled_are_placed_alike() -> None:
    down = shifted(30)
    steps = placed(EvenTimesteps(8), down)
    assert placed(EvenTimesteps(8), [1 - t / 1000 for t in down]) == steps
    assert placed(EvenTimesteps(8), [t / 1000 for t in down]) == steps


def test_timesteps_that_repeat_are_placed_by_evaluation() -> None:
    """Heun's method calls the model twice with each timestep but the first."""
    heun = [10.0, 8.0, 8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0]
    steps = placed(EvenTimesteps(3), heun)
    assert steps == [0, 3, 8]
    assert placed(EvenTimesteps(2), [3.0, 3.0, 3.0]) == [0, 2]


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 30, 50])
@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_compute_as_many_steps_by_timestep_as_by_index(name: str, steps: int) -> None:
    preset = PRESETS[name]
    by_index = [s for s in range(steps) if s == 0 or preset.computes(s, steps)]
    by_timestep = placed(preset, shifted(steps))
    assert len(by_timestep) == len(by_index)
    assert by_timestep[0] == 0
    assert by_timestep[-1] == steps - 1
    if steps > 20:
        assert by_timestep != by_index


def test_even_indexes_where_the_number_alone_is_known() -> None:
    for steps in range(1, 40):
        for count in range(1, 45):
            schedule = EvenTimesteps(count)
            told = [s for s in range(steps) if schedule.computes(s, steps)]
            assert told == placed(schedule, range(steps)), (steps, count)
            assert len(told) == min(steps, count)


def test_even_indexes_of_fifty_where_nothing_is_known() -> None:
    steps = [s for s in range(50) if EvenTimesteps(5).computes(s, None)]
    assert steps == [0, 10, 20, 30, 40]
    assert all(EvenTimesteps(60).computes(s, None) for s in range(70))


# --- the next computed step -----------------------------------------------------------------------


def test_the_next_computed_step() -> None:
    listed = ListedSteps(frozenset({0, 4, 9}))
    assert [listed.next_computed(s, None) for s in (0, 3, 4, 9)] == [4, 4, 9, None]
    assert listed.next_computed(4, 9) is None
    even = PRESETS["fast"]
    computed = [s for s in range(30) if even.computes(s, 30)]
    for step, following in zip(computed, [*computed[1:], None], strict=True):
        assert even.next_computed(step, 30) == following


def test_the_next_computed_step_of_a_course() -> None:
    timesteps = tuple(shifted(20))
    course = DeepCache(computed_steps=5).course(20, timesteps)
    steps = placed(EvenTimesteps(5), timesteps)
    assert [s for s in range(20) if course.computes(s)] == steps
    assert [course.next_computed(s) for s in steps] == [*steps[1:], None]


# --- what tells the timesteps -------------------------------------------------------------------

SHIFTED = shifted(12)
BY_TIMESTEP = drawn(EvenTimesteps(4), SHIFTED)
BY_INDEX = "CrrrCrrCrrrC"

FORMS = {
    "list": SHIFTED,
    "tensor": torch.tensor(SHIFTED, dtype=torch.float64),
    "array": np.array(SHIFTED),
    "integers": [round(t) for t in SHIFTED],
    "list of tensors": [*torch.tensor(SHIFTED)],
    "function": lambda: torch.tensor(SHIFTED),
    "shares of 1000": [t / 1000 for t in SHIFTED],
}


def test_both_placements_differ() -> None:
    assert BY_TIMESTEP != BY_INDEX
    assert BY_TIMESTEP.count("C") == BY_INDEX.count("C") == 4


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_timesteps(form: str) -> None:
    assert run(toy(computed_steps=4, timesteps=FORMS[form]), SHIFTED) == BY_TIMESTEP


@pytest.mark.parametrize("form", FORMS)
def test_they_can_be_set_on_the_cached_model(form: str) -> None:
    cached = toy(computed_steps=4, timesteps=lambda: pytest.fail("what is set goes first"))
    cached.timesteps = FORMS[form]
    assert run(cached, SHIFTED) == BY_TIMESTEP
    if form != "shares of 1000":
        assert cached.timesteps == pytest.approx(SHIFTED, abs=0.6)
    assert not hasattr(dit_cache_fx.cached_model.original(cached), "timesteps")


def test_a_function_is_asked_once_a_generation_at_its_first_call() -> None:
    asked: list[int] = []
    lengths = iter([12, 8])

    def timesteps() -> list[float]:
        asked.append(next(lengths))
        return shifted(asked[-1])

    cached = toy(computed_steps=4, timesteps=timesteps)
    assert asked == []
    assert run(cached, SHIFTED) == BY_TIMESTEP
    assert asked == [12]
    assert run(cached, shifted(8)) == drawn(EvenTimesteps(4), shifted(8))
    assert asked == [12, 8]
    assert cached.timesteps == tuple(shifted(8))
    assert cached.num_steps == 8


def test_they_are_learnt_from_the_generation_before() -> None:
    cached = toy(computed_steps=4, num_steps=12)
    with pytest.warns(DitCacheWarning, match=r"timesteps are unknown .* pass timesteps="):
        assert run(cached, SHIFTED) == BY_INDEX
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(cached, SHIFTED) == BY_TIMESTEP
        cached.clear_states()
        assert run(cached, SHIFTED) == BY_TIMESTEP
        cached.reset_states()
        assert run(cached, SHIFTED) == BY_INDEX  # warned once is enough


def test_presets_go_by_timestep_once_they_know_them() -> None:
    cached, timesteps = toy(schedule="fast"), shifted(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(cached, timesteps)
        assert run(cached, timesteps) == drawn(PRESETS["fast"], timesteps)
    assert run(toy(schedule="fast", timesteps=timesteps), timesteps) == drawn(
        PRESETS["fast"], timesteps
    )


def test_both_branches_of_a_step_share_them() -> None:
    cached = toy(computed_steps=3, timesteps=shifted(6))
    for step, timestep in enumerate(shifted(6)):
        for name in ("cond", "uncond"):
            with cached.cache_context(name):
                cached(**toy_inputs(timestep, seed=step))
    one = drawn(EvenTimesteps(3), shifted(6))
    assert actions(cached) == "".join(2 * action for action in one)


def test_those_of_a_longer_run_are_not_taken_for_a_shorter_one() -> None:
    """The second call tells that the generation is another one than the one before."""
    cached = toy(computed_steps=4)
    with pytest.warns(DitCacheWarning, match="timesteps are unknown"):
        run(cached, shifted(30))
    expected = toy(computed_steps=4, num_steps=30)
    with pytest.warns(DitCacheWarning):
        assert run(cached, SHIFTED) == run(expected, SHIFTED)
    assert run(cached, SHIFTED) == BY_TIMESTEP


def test_a_run_that_leaves_out_the_first_ones() -> None:
    """img2img: the scheduler's timesteps are all there, the calls start later."""
    cached = toy(computed_steps=4, timesteps=lambda: shifted(20))
    assert run(cached, shifted(20)[8:]) == drawn(EvenTimesteps(4), shifted(20)[8:])
    assert cached.num_steps == 12


@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.001, 0.0), (-0.001, 1.0)])
@pytest.mark.parametrize("left_out", [0, 7])
def test_the_first_call_in_the_units_of_models(scale: tuple[float, float], left_out: int) -> None:
    timesteps = shifted(20)
    value = torch.tensor(scale[0] * timesteps[left_out] + scale[1]).bfloat16().item()
    assert from_call(timesteps, value) == tuple(timesteps[left_out:])


def test_a_first_call_like_none_of_them_takes_them_all() -> None:
    timesteps = shifted(20)
    assert from_call(timesteps, -37.5) == tuple(timesteps)


def test_a_first_call_of_one_is_not_the_end() -> None:
    """Counted from the end it would be the 0 that a scheduler may have behind the last call."""
    timesteps = [1.57, 1.18, 0.79, 0.39, 0.0]
    assert from_call(timesteps, 1.0) == tuple(timesteps)
    assert from_call(timesteps, 0.0) == (0.0,)


# --- tokens that are given -----------------------------------------------------------------------


def half_given(timestep: float, seed: int) -> dict[str, Any]:
    """Half of the tokens are given, as the first frame of a video; their timestep is 0."""
    inputs = toy_inputs(timestep, seed=seed)
    times = torch.full(inputs["x"].shape[:2], timestep)
    times[:, : times.shape[1] // 2] = 0
    return inputs | {"timestep": times}


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_tokens_that_the_sampler_moves_tell_the_step(scale: float) -> None:
    cached = toy(kind=PerTokenDiT, computed_steps=4, timesteps=SHIFTED)
    for generation in range(2):
        for step, timestep in enumerate(SHIFTED):
            cached(**half_given(scale * timestep, step))
        assert actions(cached) == BY_TIMESTEP, generation


def test_given_tokens_of_a_run_that_leaves_out_the_first_ones() -> None:
    cached = toy(kind=PerTokenDiT, computed_steps=4, timesteps=lambda: shifted(20))
    for step, timestep in enumerate(shifted(20)[8:]):
        cached(**half_given(timestep, step))
    assert actions(cached) == drawn(EvenTimesteps(4), shifted(20)[8:])


def test_which_value_is_the_samplers() -> None:
    timesteps = shifted(20)
    seventh = timesteps[7]
    assert told_of(timesteps, [0.0, 1000.0]) == 1000.0
    assert told_of(timesteps, [0.0, seventh]) == seventh
    assert told_of(timesteps, [0.0, seventh / 1000]) == seventh / 1000
    assert told_of(timesteps, [1 - seventh / 1000, 2.0]) == 1 - seventh / 1000  # from the end
    assert told_of(timesteps, [-37.5, 4000.0]) is None


@pytest.mark.parametrize("nothing", [None, [], torch.zeros(0)])
def test_a_function_that_does_not_know_yet(nothing: Any) -> None:
    cached = toy(computed_steps=4, num_steps=12, timesteps=lambda: nothing)
    with pytest.warns(DitCacheWarning, match="timesteps are unknown"):
        assert run(cached, SHIFTED) == BY_INDEX


def test_timesteps_of_another_run_are_not_used() -> None:
    """What a scheduler has before it is told the number of steps, say."""
    cached = toy(computed_steps=4, num_steps=12, timesteps=lambda: shifted(1000))
    with pytest.warns(DitCacheWarning, match="are not those of the calls"):
        assert run(cached, SHIFTED) == BY_INDEX


def test_more_calls_than_timesteps() -> None:
    cached = toy(computed_steps=3, timesteps=SHIFTED[:6])
    with pytest.warns(DitCacheWarning, match="more calls than timesteps") as caught:
        done = run(cached, SHIFTED)
    assert len(caught) == 1
    assert done[:6] == drawn(EvenTimesteps(3), SHIFTED[:6])
    assert len(done) == 12


def test_an_explicit_step_index_goes_by_them_too() -> None:
    cached = toy(computed_steps=4, timesteps=SHIFTED)
    for step, timestep in enumerate(SHIFTED):
        cached.cur_timestep = step
        cached(**toy_inputs(timestep, seed=step))
    assert actions(cached) == BY_TIMESTEP


def test_copies_and_pickles_have_them() -> None:
    cached = copy.deepcopy(toy(computed_steps=4, timesteps=SHIFTED))
    assert run(cached, SHIFTED) == BY_TIMESTEP
    strategy = DeepCache(computed_steps=4, timesteps=torch.tensor(SHIFTED))
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert hash(strategy.timesteps)


def test_the_report_says_how_the_steps_were_chosen() -> None:
    cached = toy(computed_steps=4, timesteps=SHIFTED)
    run(cached, SHIFTED)
    assert cached.cache_report().schedule == "computed_steps 4"
    assert "(4 in all)" in str(cached.explain())


def test_the_schedule_object_is_the_short_form() -> None:
    assert run(toy(schedule=EvenTimesteps(4), timesteps=SHIFTED), SHIFTED) == BY_TIMESTEP


# --- where no host is: exported programs --------------------------------------------------------


def test_an_exported_program_has_them() -> None:
    steps, _ = fixed_steps(DeepCache(computed_steps=4), 12, tuple(SHIFTED))
    assert [s for s in steps if s < 12] == placed(EvenTimesteps(4), SHIFTED)
    cached = toy(computed_steps=4)
    first = toy_inputs(SHIFTED[0])
    with pytest.raises(OptionError, match=r"num_steps=None: EvenTimesteps\(.*\) .*timesteps"):
        dit_cache_fx.export(cached, kwargs=first)
    cached.timesteps = SHIFTED
    runner = dit_cache_fx.export(cached, kwargs=first).runner()
    cached.clear_states()
    for step, timestep in enumerate(SHIFTED):
        inputs = toy_inputs(timestep, seed=step)
        torch.testing.assert_close(runner(**inputs), cached(**inputs))
    assert actions(cached) == BY_TIMESTEP


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        5,
        "abc",
        [],
        ["a", 3],
        [1.0, None],
        [1.0, float("nan")],
        [1.0, True],
        [[1.0, 2.0]],
        torch.zeros(2, 3),
        torch.tensor(3.0),
        np.zeros((2, 2)),
        {3.0, 2.0},
        [1j],
    ],
)
def test_timesteps_that_are_none(value: Any) -> None:
    text = r"timesteps=.*: the timesteps of a generation's calls, in order: a flat sequence"
    refused(f"(?s){text}", make(ToyDiT), computed_steps=2, timesteps=value)
    with pytest.raises(OptionError, match=f"(?s){text}"):
        toy(computed_steps=2).timesteps = value


@pytest.mark.parametrize("value", [5, "abc", torch.zeros(2, 3)])
def test_a_function_that_gives_no_timesteps(value: Any) -> None:
    told = [value, SHIFTED]
    cached = toy(computed_steps=4, timesteps=lambda: told.pop(0))
    with pytest.raises(OptionError, match=r"(?s)timesteps\(\)=.*: the timesteps of a generation"):
        run(cached, SHIFTED)
    assert run(cached, SHIFTED) == BY_TIMESTEP


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5", [5]])
def test_numbers_of_computed_steps_that_cannot_be(value: Any) -> None:
    text = r"computed_steps=.*: the number of steps .* to compute in full: an integer from 1"
    refused(text, make(ToyDiT), computed_steps=value)
    with pytest.raises(OptionError, match=text):
        EvenTimesteps(value)


@pytest.mark.parametrize("known", [{"num_steps": 12}, {"timesteps": SHIFTED}])
def test_more_computed_steps_than_steps(known: dict[str, Any]) -> None:
    text = r"computed_steps=13: .*an integer from 1 to 12, the number of its steps"
    refused(text, make(ToyDiT), computed_steps=13, **known)
    refused(text, make(ToyDiT), schedule=EvenTimesteps(13), **known)
    ((name, value),) = known.items()
    cached = toy(computed_steps=13, **{name: lambda: value})
    with pytest.raises(OptionError, match=text):
        run(cached, SHIFTED)
    setattr(cached, name, value)
    with pytest.raises(OptionError, match=text):
        run(cached, SHIFTED)


def test_more_computed_steps_than_were_counted_are_all() -> None:
    cached = toy(computed_steps=13, num_steps=None)
    with pytest.warns(DitCacheWarning):
        run(cached, SHIFTED)
    assert run(cached, SHIFTED) == 12 * "C"


def test_a_number_beside_other_timesteps() -> None:
    text = "num_steps=11: there are 12 timesteps: pass only one of both"
    refused(text, make(ToyDiT), computed_steps=3, num_steps=11, timesteps=SHIFTED)


def test_two_ways_to_say_which_steps() -> None:
    refused("computed_steps=3: compute_ratio is given too", make(ToyDiT), compute_ratio=0.5,
            computed_steps=3)  # fmt: skip
