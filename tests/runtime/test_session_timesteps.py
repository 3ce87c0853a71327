"""Each request has its own timesteps; models of one pipeline share those of its runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import OptionError, TaylorCache
from tests.toys import ToyDiT, make, toy_inputs


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    even = [1 - i / steps for i in range(steps)]
    return [1000 * shift * u / (1 + (shift - 1) * u) for u in even]


def call(cached: Any, timestep: float, seed: int = 0, prompt: int = 0) -> None:
    with torch.no_grad():
        cached(**toy_inputs(timestep, seed=seed, prompt=prompt))


def planned(timesteps: list[float], computed: int) -> list[int]:
    course = TaylorCache(computed_steps=computed).course(len(timesteps), tuple(timesteps))
    return [step for step in range(len(timesteps)) if course.computes(step)]


def computed(records: Any) -> list[int]:
    return [r.step for r in records if r.action == "computed"]


def test_requests_of_other_numbers_of_steps_in_turn() -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "taylorcache", computed_steps=4)
    runs = [(cached.new_session(), shifted(12)), (cached.new_session(), shifted(7, 1.0))]
    for session, timesteps in runs:
        session.timesteps = timesteps
    for step in range(12):
        for number, (session, timesteps) in enumerate(runs):
            if step < len(timesteps):
                with session:
                    call(cached, timesteps[step], prompt=number)
    for session, timesteps in runs:
        with session:
            assert computed(cached.cache_report().timeline) == planned(timesteps, 4)


def test_they_go_before_those_of_the_model_and_end_a_generation() -> None:
    own = shifted(6)
    cached = dit_cache_fx.apply(
        make(ToyDiT), "taylorcache", computed_steps=3, timesteps=lambda: shifted(30)
    )
    session = cached.new_session()
    session.timesteps = lambda: own
    with session:
        for t in own:
            call(cached, t)
        assert computed(cached.cache_report().timeline) == planned(own, 3)
        call(cached, own[-1] - 1)  # a seventh step is none of this run
        assert [r.step for r in cached.cache_report().timeline] == [0]


def test_what_is_no_timesteps_is_refused() -> None:
    session = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0}).new_session()
    with pytest.raises(OptionError, match=r"timesteps=.*: the timesteps of a gen"):
        session.timesteps = ["first"]  # type: ignore[list-item]
    assert session.timesteps is None


@pytest.mark.parametrize("first", ["transformer", "unconditional_transformer"])
def test_two_models_that_are_called_in_each_step(first: str) -> None:
    """Guidance by a second model: each follows the plan, and neither begins anew for the other."""
    pipe = SimpleNamespace(
        transformer=make(ToyDiT),
        unconditional_transformer=make(ToyDiT),
        scheduler=SimpleNamespace(timesteps=None),
    )
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=4)
    names = sorted(("transformer", "unconditional_transformer"), key=lambda name: name != first)
    for steps in (10, 8, 10):
        pipe.scheduler.timesteps = torch.tensor(shifted(steps))
        for step, t in enumerate(pipe.scheduler.timesteps.tolist()):
            for name in names:
                call(getattr(pipe, name), t, seed=step)
        for name in names:
            timeline = getattr(pipe, name).cache_report().timeline
            assert computed(timeline) == planned(shifted(steps), 4)
            assert len(timeline) == steps


def test_a_third_model_goes_on_where_the_second_stopped() -> None:
    names = ("transformer", "transformer_2", "transformer_3")
    pipe = SimpleNamespace(**{name: make(ToyDiT) for name in names})
    pipe.scheduler = SimpleNamespace(timesteps=torch.tensor(shifted(15)))
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=6)
    for _ in range(2):
        steps = []
        for step, t in enumerate(pipe.scheduler.timesteps.tolist()):
            call(getattr(pipe, names[step // 5]), t, seed=step)
        for number, name in enumerate(names):
            timeline = getattr(pipe, name).cache_report().timeline
            steps += [5 * number + step for step in computed(timeline)]
        assert steps == sorted({*planned(shifted(15), 6), 5, 10})
