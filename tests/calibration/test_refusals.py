"""What `calibrate` refuses, and what it says would be right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import DitCacheError, OptionError
from tests.calibration.sampling import calibrated, noise, runs_of, sample, toy
from tests.toys import ToyDiT, make

pytestmark = pytest.mark.usefixtures("no_grad")


def refused(
    match: str, runs: Any = None, computed: Any = 3, cached: Any = None, **options: Any
) -> None:
    model = cached or toy()
    with pytest.raises(OptionError, match=match) as caught:
        calibrated(model, runs(model) if callable(runs) else runs, computed, **options)
    assert isinstance(caught.value, DitCacheError)


def test_a_model_that_is_not_cached() -> None:
    refused(
        "cached='ToyDiT': the model that dit_cache_fx.apply returned",
        lambda _: [print],
        3,
        make(ToyDiT),
    )


@pytest.mark.parametrize("runs", [[], [None], "text", [sample, 3]])
def test_runs_that_are_no_functions(runs: Any) -> None:
    refused("^runs=.*: functions without arguments", lambda _: runs)


@pytest.mark.parametrize("computed", [0, -1, True, 2.5, [], ["7"], "7", [3, 0], None])
def test_computed_that_are_no_numbers_of_steps(computed: Any) -> None:
    refused(
        "^computed=.*: the numbers of steps to compute in full: integers from 1", computed=computed
    )


def test_more_computed_than_there_are_steps() -> None:
    refused(r"computed=\[3, 9\]: at most 8, the number of steps", computed=(3, 9))


def test_runs_that_do_not_call_the_model() -> None:
    refused(
        r"runs\[0\]='no call of the cached model': a whole generation through the calibrated model",
        lambda _: [lambda: torch.ones(3)],
    )
    uncached = make(ToyDiT)
    refused(r"runs\[1\]='no call", lambda m: [*runs_of(m, (0,)), *runs_of(uncached, (0,))])


@pytest.mark.parametrize("value", [None, [], "picture", 3.5, {"images": None}, torch.zeros(0)])
def test_runs_that_return_nothing(value: Any) -> None:
    refused(
        r"runs\[0\]=.*: a function without arguments that generates once",
        lambda m: [lambda: (sample(m, 0), value)[1]],
    )


def test_results_that_are_not_finite() -> None:
    refused(r"runs\[0\]=.*not finite", lambda m: [lambda: sample(m, 0) * torch.nan])


def drifting(model: Any) -> list[Callable[[], Any]]:
    seeds = itertools.count()
    return [lambda: sample(model, next(seeds))]


def late(model: Any) -> list[Callable[[], Any]]:
    """The second run is another one from the second time on."""
    seeds = itertools.chain([1], itertools.count(7))
    return [lambda: sample(model, 0), lambda: sample(model, next(seeds))]


def noisy(model: Any) -> list[Callable[[], Any]]:
    """The sample is the same at the start, and another one at the end."""
    added = itertools.count()
    return [lambda: sample(model, 0) + 0.1 * noise(next(added))]


def test_runs_that_differ_from_time_to_time() -> None:
    refused(
        r"runs\[0\]='results that are -?\d+\.\d dB apart when it is called twice': the same",
        drifting,
    )
    refused(r"runs\[0\]='results that are \d\d\.\d dB apart.*a generator with a seed", noisy)
    refused(r"runs\[1\]='first samples that differ by \d+% when it is called twice'", late)


def test_runs_of_several_lengths() -> None:
    refused(
        r"runs\[1\]='a generation of 5 steps from 1000 to .*': the timesteps of the first "
        "generation, 8 steps from 1000",
        lambda m: [lambda: sample(m, 0), lambda: sample(m, 0, steps=5)],
    )


def test_results_of_several_shapes() -> None:
    sizes = itertools.count(2)
    refused(
        r"runs\[0\]=.*: the same shapes each time",
        lambda m: [lambda: sample(m, 0)[..., : next(sizes)]],
    )


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        (3, "^plain=3: a function that takes a number of steps"),
        (lambda _: torch.ones(1, 6, 8), r"^plain\(3\)=.*: a list of 2 results, one a run"),
        (lambda _: [torch.ones(1, 6, 8)], r"^plain\(3\)=.*: a list of 2 results"),
        (lambda _: [None, None], r"^plain\(3\)=None"),
        (lambda _: [torch.ones(2), torch.ones(2)], r"^plain\(3\)=.*: the same shapes"),
    ],
)
def test_a_plain_sampler_that_cannot_be_compared(plain: Any, match: str) -> None:
    refused(match, plain=plain)


def test_a_compiled_model_is_the_cached_one_inside() -> None:
    cached = toy()
    compiled = torch.compile(cached, backend="eager")
    assert dit_cache_fx.calibrate(compiled, runs_of(cached), 8, progress=False).rows  # type: ignore[arg-type]
