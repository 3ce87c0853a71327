"""Plans: where their steps come in other generations, and that every mode follows them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import DitCacheWarning, OptionError, Strategy, TaylorCache
from dit_cache_fx.calibration import Calibration, Row
from dit_cache_fx.calibration.row import calibrated
from dit_cache_fx.export import export
from dit_cache_fx.strategies.calibrated import CalibratedSteps
from dit_cache_fx.strategies.model_signature import ModelSignature
from tests.calibration.sampling import sample, times
from tests.toys import DIM, ToyDiT, actions, make, toy_inputs

CALLED = tuple(float(torch.tensor(1000 * t)) for t in times()[:-1])
#: of eight steps
PLANNED = frozenset({0, 2, 5, 7})
TOY = ModelSignature("ToyDiT", (("blocks", 3),), DIM)


pytestmark = pytest.mark.usefixtures("no_grad")


def plan(steps: frozenset[int] = PLANNED, **options: Any) -> Strategy:
    predictor = TaylorCache(no_cache_steps={0}, **{"max_order": 1, "corrector": 0.5, **options})
    return calibrated(predictor, steps, CALLED, TOY)


def front() -> Calibration:
    rows = [
        Row(count, plan(frozenset([*range(count - 1), 7])), "searched", db, db - 3, db - 2)
        for count, db in ((3, 41.0), (4, 45.5), (6, 44.0))
    ]
    return Calibration(TOY, CALLED, 4, tuple(rows))


def cached(strategy: Strategy) -> Any:
    return dit_cache_fx.apply(make(ToyDiT), strategy, check=False)


def done(model: Any, seed: int = 0, **options: Any) -> str:
    sample(model, seed, **options)
    return actions(model)


def computed(done: str) -> list[int]:
    return [step for step, action in enumerate(done) if action == "C"]


def placed(timesteps: Sequence[float], steps: frozenset[int] = PLANNED) -> list[int]:
    schedule = CalibratedSteps(steps, CALLED, TOY).placed(timesteps)
    number = len(timesteps)
    return [s for s in range(number) if schedule.computes(s, number)]


# --- which plan ---------------------------------------------------------------------------------


def test_a_plan_by_its_number_or_its_quality() -> None:
    found = front()
    assert found.plan(computed=4) is not None
    assert len(found.plan(computed=4).schedule.steps) == 4  # type: ignore[union-attr]
    assert found.plan(psnr=41.0) == found.plan(computed=3)
    assert found.plan(psnr=41.1) == found.plan(computed=4)
    assert found.plan(psnr=-10) == found.plan(3)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"computed": 5}, r"^computed=5: a calibrated number: one of \[3, 4, 6\]"),
        ({"psnr": 45.6}, r"^psnr=45.6: at most 45.5 dB, which 4 computed steps reach"),
        ({"psnr": "45"}, "^psnr='45': a PSNR in dB"),
        ({"psnr": float("nan")}, "^psnr=nan: a PSNR in dB"),
        ({}, "^computed=None: one of computed= and psnr="),
        ({"computed": 3, "psnr": 40.0}, "^computed=3: one of computed= and psnr="),
        ({"computed": 3, "timesteps": ["x"]}, "^timesteps="),
    ],
)
def test_a_plan_that_there_is_not(given: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        front().plan(**given)


# --- where the steps come -----------------------------------------------------------------------


def test_the_calibrated_timesteps_in_any_unit() -> None:
    for unit in (1.0, 0.001):
        assert placed([unit * t for t in CALLED]) == sorted(PLANNED)
    assert placed([1 - t / 1000 for t in CALLED]) == sorted(PLANNED)
    assert placed(torch.tensor(CALLED).bfloat16().tolist()) == sorted(PLANNED)


@pytest.mark.parametrize("steps", [5, 16, 30])
@pytest.mark.parametrize("unit", [1.0, 0.001])
def test_another_number_of_steps_is_by_noise_level(steps: int, unit: float) -> None:
    timesteps = [unit * 1000 * t for t in times(steps)[:-1]]
    found = placed(timesteps)
    assert len(found) == 4
    assert (found[0], found[-1]) == (0, steps - 1)
    for step in (2, 5):  # the ones between, each the nearest
        distance = [abs(t - unit * CALLED[step]) for t in timesteps]
        assert distance.index(min(distance)) in found


def test_fewer_steps_than_the_plan_computes_are_all_computed() -> None:
    assert placed([1000.0, 800.0, 300.0]) == [0, 1, 2]
    assert placed([1000.0]) == [0]


def test_a_generation_that_starts_in_the_middle_has_the_steps_that_are_left() -> None:
    assert placed(CALLED[3:]) == [0, 2, 4]
    assert placed([t / 1000 for t in CALLED[5:]]) == [0, 2]


def test_a_plan_that_leaves_out_the_last_step_goes_on_doing_so() -> None:
    steps = [1000 * t for t in times(16)[:-1]]
    assert 15 not in placed(steps, frozenset({0, 4}))


def test_timesteps_that_repeat_are_placed_by_evaluation() -> None:
    heun = tuple(t for t in CALLED for _ in (0, 1))[:-1]
    schedule = CalibratedSteps(frozenset({0, 3, 4, 14}), heun, TOY)
    assert schedule.placed(heun) == schedule.placed([t / 1000 for t in heun])
    assert [s for s in range(15) if schedule.placed(heun).computes(s, 15)] == [0, 3, 4, 14]


# --- in a cached model --------------------------------------------------------------------------


def test_the_first_generation_is_as_planned_and_says_nothing() -> None:
    model = cached(plan())
    assert computed(done(model)) == sorted(PLANNED)
    assert computed(done(model, seed=1)) == sorted(PLANNED)
    assert "schedule: calibrated, 4 of 8 steps, for 8 steps" in str(model.cache_report())


def test_told_timesteps_are_carried_over_with_one_warning() -> None:
    model = cached(front().plan(4, timesteps=[1000 * t for t in times(16)[:-1]]))
    with pytest.warns(
        DitCacheWarning, match="calibrated for 8 steps of other.*these 16 by"
    ) as told:
        first = done(model, steps=16)
    assert len(told) == 1
    assert computed(first) == placed([1000 * t for t in times(16)[:-1]], frozenset({0, 1, 2, 7}))
    assert done(model, seed=1, steps=16) == first


def test_untold_timesteps_are_learnt_and_then_carried_over() -> None:
    model = cached(plan())
    with pytest.warns(DitCacheWarning, match="the timesteps are unknown at"):
        first = done(model, steps=16)
    assert computed(first) == [0, 2, 4, 6, 8, 10, 12, 14]  # as large a share, to the end
    with pytest.warns(DitCacheWarning, match="carried over to these 16 by noise level: 4 are"):
        second = done(model, seed=1, steps=16)
    assert computed(second) == placed([1000 * t for t in times(16)[:-1]])


def test_a_number_of_steps_alone_goes_by_the_share_of_the_way() -> None:
    schedule = CalibratedSteps(PLANNED, CALLED, TOY)
    assert [s for s in range(16) if schedule.computes(s, 16)] == [0, 4, 10, 14]
    assert [s for s in range(12) if schedule.computes(s, None)] == [0, 2, 5, 7, 8, 9, 10, 11]


def test_copies_and_pickles_follow_it_too() -> None:
    model = cached(plan())
    for made in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert computed(done(made)) == sorted(PLANNED)


# --- compiled and exported ----------------------------------------------------------------------

OPTIONS = [{}, {"axis": "timestep", "corrector": 1.0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_as_one_graph(options: dict[str, Any]) -> None:
    eager = cached(plan(**options))
    model = cached(plan(**options))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(sample(compiled, 0), sample(eager, 0), atol=1e-5)
    assert actions(model) == actions(eager)


@pytest.mark.parametrize("options", OPTIONS)
def test_exported(options: dict[str, Any]) -> None:
    """The program is told nothing: it takes its steps for those that were calibrated."""
    eager = cached(plan(**options))
    want = sample(eager, 0)
    model = cached(plan(**options))
    args = toy_inputs(1000.0)
    runner = export(model, (args["x"], args["timestep"], args["text"])).runner()
    assert torch.allclose(sample(runner, 0), want, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_in_the_backend(options: dict[str, Any]) -> None:
    eager, cache = cached(plan(**options)), dit_cache_fx.backend(plan(**options), inner="eager")
    compiled = torch.compile(make(ToyDiT), backend=cache)
    assert torch.allclose(sample(compiled, 0), sample(eager, 0), atol=1e-5)
    assert cache.cache_report().steps_computed == 4


# --- another model ------------------------------------------------------------------------------


class OtherDiT(ToyDiT):
    """Another class."""


def widened(count: int) -> ToyDiT:
    """A toy with more of its width: most dimensions of its parameters have another size."""
    model = make(ToyDiT)
    model.more = torch.nn.ModuleDict({str(i): torch.nn.Linear(24, 24) for i in range(count)})
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: make(OtherDiT), "class: OtherDiT here, ToyDiT where it was calibrated"),
        (lambda: make(ToyDiT, depth=4), "blocks in 'blocks': 4 here, 3 where it was calibrated"),
        (lambda: widened(40), "width: 24 here, 8 where it was calibrated"),
    ],
)
def test_another_model_is_refused_and_told_by_what(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(OptionError, match=rf"a calibrated plan.*another model: {match}.*Calibrate"):
        dit_cache_fx.apply(build(), plan())


def test_everything_that_differs_is_told() -> None:
    plans = calibrated(
        TaylorCache(no_cache_steps={0}), PLANNED, CALLED, ModelSignature("A", (("trunk", 3),), 9)
    )
    with pytest.raises(OptionError) as caught:
        dit_cache_fx.apply(make(ToyDiT), plans)
    for told in ("class: ToyDiT here, A", "no block list 'trunk' of 3 blocks", "width: 8 here, 9"):
        assert told in str(caught.value)


@pytest.mark.parametrize("build", [lambda: make(ToyDiT, depth=4), lambda: make(ToyDiT, depth=2)])
def test_the_backend_refuses_another_model(build: Callable[[], Any]) -> None:
    compiled = torch.compile(build(), backend=dit_cache_fx.backend(plan(), inner="eager"))
    with pytest.raises(Exception, match=r"another model: blocks in 'blocks': \d here, 3 where"):
        sample(compiled, 0)


def test_another_dtype_and_adapters_are_no_other_model() -> None:
    model = make(ToyDiT).bfloat16()
    for rank in range(2):
        model.blocks[rank].lora_A = torch.nn.Linear(DIM, 2, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dit_cache_fx.apply(model, plan())
