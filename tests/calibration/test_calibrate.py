"""`calibrate` on toys: what it returns, what it costs, and how it leaves the model."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import CachedModel, Calibration, TaylorCache
from dit_cache_fx.calibration.candidates import predictors
from dit_cache_fx.calibration.judge import generations
from dit_cache_fx.strategies.even import evenly_spaced
from tests.calibration.sampling import (
    STEPS,
    calibrated,
    mean_db,
    noise,
    runs_of,
    sample,
    texts,
    times,
    toy,
)
from tests.toys import actions

SEEDS = (0, 1, 2)
#: the timesteps of the sampler's calls
CALLED = tuple(1000 * t for t in times()[:-1])


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def found() -> tuple[CachedModel, Calibration]:
    cached = toy()
    return cached, calibrated(cached, runs_of(cached, SEEDS))


def planned(cached: CachedModel, plan: Any) -> CachedModel:
    return dit_cache_fx.apply(cached._model, plan, check=False)


# --- what it returns ----------------------------------------------------------------------------


def test_a_plan_gives_what_the_table_says(found: tuple[CachedModel, Calibration]) -> None:
    cached, front = found
    assert [row.computed for row in front.rows] == [3, 4]
    for row in front.rows:
        plan = planned(cached, front.plan(row.computed))
        assert mean_db(plan, cached._model, SEEDS) == pytest.approx(row.psnr, abs=0.01)
        assert plan.cache_report().steps_computed == row.computed


def test_a_plan_is_never_worse_than_the_preset(found: tuple[CachedModel, Calibration]) -> None:
    cached, front = found
    for row in front.rows:
        preset = TaylorCache(computed_steps=row.computed, timesteps=CALLED)
        db = mean_db(planned(cached, preset), cached._model, SEEDS)
        assert row.preset >= db - 0.01
        assert row.psnr >= row.preset


def test_it_is_the_same_for_the_same_runs(found: tuple[CachedModel, Calibration]) -> None:
    cached, front = found
    assert calibrated(cached, runs_of(cached, SEEDS)) == front


@pytest.mark.parametrize("cfg", ["two calls", "contexts", "batch"])
def test_guidance_in_each_of_its_forms(cfg: str) -> None:
    cached = toy()
    front = calibrated(cached, runs_of(cached, SEEDS, cfg=cfg), 3)
    plan = planned(cached, front.plan(3))
    db = mean_db(plan, cached._model, SEEDS, cfg=cfg)
    assert db == pytest.approx(front.rows[0].psnr, abs=0.01)
    preset = planned(cached, TaylorCache(computed_steps=3, timesteps=CALLED))
    assert db > mean_db(preset, cached._model, SEEDS, cfg=cfg) + 1


def test_a_batch_counts_as_its_samples(found: tuple[CachedModel, Calibration]) -> None:
    """The mean of the samples' dB, not the dB of their mean."""
    cached, _ = found
    front = calibrated(cached, runs_of(cached, (0,), batch=3), 3)
    plan = planned(cached, front.plan(3))
    got, want = sample(plan, 0, batch=3), sample(cached._model, 0, batch=3)
    errors = (got - want).square().flatten(1).mean(1) / (want.max() - want.min()) ** 2
    each = -10 * torch.log10(errors)
    assert front.rows[0].psnr == pytest.approx(float(each.mean()), abs=0.01)
    assert front.rows[0].lowest == pytest.approx(float(each.min()), abs=0.01)


def test_every_step_computed_is_no_worse_than_the_same() -> None:
    cached = toy()
    front = calibrated(cached, computed=(1, STEPS))
    assert [row.psnr for row in front.rows][1] == 120.0
    assert [sorted(front.plan(n).schedule.steps) for n in (1, STEPS)] == [[0], [*range(STEPS)]]


def test_blocks_that_are_never_cached_stay_so() -> None:
    cached = toy("deepcache", no_cache_steps={0, 4}, no_cache_block_id={"blocks": {2}})
    plan = calibrated(cached, computed=3).plan(3)
    assert plan.no_cache_block_id == {"blocks": frozenset({2})}
    applied = planned(cached, plan)
    sample(applied, 0)
    assert applied.cache_report().cached_blocks == {"blocks": (0, 1)}


def test_the_models_own_strategy_is_among_the_candidates() -> None:
    own = dit_cache_fx.HiCache(no_cache_steps={0}, sigma=0.7)
    tried = predictors(own, CALLED)
    assert tried[0] == TaylorCache(no_cache_steps={0})
    assert tried[1] == own
    assert len(tried) == 3 * 3 * 2 + 1  # kinds, correctors and axes, and its own
    assert len(predictors(TaylorCache(no_cache_steps={0}), [3.0, 2.0, 1.0])) == 3 * 3  # one axis
    ruled = dit_cache_fx.TeaCache(rel_l1_thresh=0.1)
    assert not any(isinstance(s, dit_cache_fx.TeaCache) for s in predictors(ruled, CALLED))


def test_runs_in_inference_mode_and_with_gradients_on() -> None:
    cached = toy()
    with torch.inference_mode():
        first = calibrated(cached, computed=STEPS)
    with torch.enable_grad():
        assert calibrated(cached, computed=STEPS) == first


def test_a_sampler_that_changes_its_sample_in_place() -> None:
    cached = toy()

    def run(in_place: bool) -> torch.Tensor:
        x, text = noise(0), texts(1)
        for now, then in itertools.pairwise(times()):
            change = (then - now) * cached(x, torch.tensor([1000 * now]), text)
            x = x.add_(change) if in_place else x + change
        return x

    first = calibrated(cached, [lambda: run(True)], 4)
    assert first == calibrated(cached, [lambda: run(False)], 4)
    assert first.rows[0].psnr > 30


# --- what it costs ------------------------------------------------------------------------------


def test_the_number_of_generations_is_bounded() -> None:
    cached, count = toy(), itertools.count()
    runs = [lambda run=run: (next(count), run())[1] for run in runs_of(cached, range(6))]
    calibrated(cached, runs, (3, 4))
    made = next(count)
    assert made <= 6 + 1 + 2 * generations(11, 6)
    assert generations(11, 6) == 11 + 5 * 2 + 3 * 3


def test_candidates_need_no_capture_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_cache_fx.runtime import graphs

    captures: list[object] = []
    real = graphs.capture

    def counted(*args: Any) -> Any:
        captures.append(args)
        return real(*args)

    monkeypatch.setattr(graphs, "capture", counted)
    calibrated(toy())
    assert len(captures) == 1


def test_the_cost_is_told_before(capsys: pytest.CaptureFixture[str]) -> None:
    cached = toy()
    calibrated(cached, computed=STEPS, progress=True)
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("dit_cache_fx: calibrating for [8] computed steps of 8: about ")
    assert "1 of them with every step computed" in told
    calibrated(cached, computed=STEPS)
    assert capsys.readouterr().err == ""


def test_it_needs_no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert calibrated(toy(), computed=STEPS, progress=True).rows


# --- how it leaves the model --------------------------------------------------------------------


def state(cached: CachedModel) -> tuple[Any, ...]:
    return cached._engine, cached._engine.call_log.strategy, cached._enabled, cached.cache_report()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_model_is_left_as_it_was(enabled: bool) -> None:
    cached = toy(no_cache_steps={0, 3}, num_steps=STEPS)
    sample(cached, 5)
    if not enabled:
        cached.disable()
    before = state(cached)
    calibrated(cached, computed=STEPS)
    assert state(cached) == before


def test_a_generation_under_way_goes_on() -> None:
    """Also with what is held for it."""
    alone, other = toy("deepcache", no_cache_steps={0}), toy("deepcache", no_cache_steps={0})
    text, x = torch.ones(1, 4, 8), torch.ones(1, 6, 8)
    for cached in (alone, other):
        cached(x, torch.tensor([900.0]), text)
    calibrated(other, computed=STEPS)
    results = [cached(0.9 * x, torch.tensor([800.0]), text) for cached in (alone, other)]
    assert torch.equal(*results)
    assert actions(other) == "Cr"


def test_the_model_is_left_as_it_was_by_a_run_that_raises() -> None:
    cached, calls = toy(), itertools.count()
    before = state(cached)

    def run() -> torch.Tensor:
        if next(calls) == 4:
            raise RuntimeError("broken")
        return sample(cached, 0)

    with pytest.raises(RuntimeError, match="broken"):
        calibrated(cached, [run], 3)
    assert state(cached) == before


def interrupted(cached: CachedModel, call: int, computed: Any = (3, 4)) -> Calibration:
    calls = itertools.count(1)

    def run() -> torch.Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return sample(cached, 0)

    return calibrated(cached, [run], computed)  # type: ignore[no-any-return]


def test_an_interrupt_leaves_what_is_known() -> None:
    cached = toy()
    before = state(cached)
    whole = interrupted(cached, 10_000)
    part = interrupted(cached, 2 + 11 + 2)  # recorded, repeated, at most 11 of the first number
    assert part.rows[0] == whole.rows[0]
    early = interrupted(cached, 4)  # one candidate was judged: a preset
    assert [row.computed for row in early.rows] == [3]
    assert early.rows[0].psnr == early.rows[0].preset
    with pytest.raises(KeyboardInterrupt):
        interrupted(cached, 2)
    assert state(cached) == before


def test_the_plain_sampler_runs_uncached(found: tuple[CachedModel, Calibration]) -> None:
    cached, _ = found
    front = calibrated(
        cached,
        runs_of(cached, SEEDS),
        STEPS,
        plain=lambda steps: [sample(cached, s, steps=steps - 5) for s in SEEDS],
    )
    raw = cached._model
    want = [sample(raw, s) for s in SEEDS]
    peak = max(float(w.max()) for w in want) - min(float(w.min()) for w in want)
    few = [sample(raw, s, steps=3) for s in SEEDS]
    pairs = zip(few, want, strict=True)
    dbs = [-10 * torch.log10((a - b).square().mean() / peak**2) for a, b in pairs]
    assert front.rows[0].plain == pytest.approx(float(torch.stack(dbs).mean()), abs=0.01)


def test_even_timesteps_are_where_they_belong() -> None:
    assert evenly_spaced(CALLED, 3) == {0, 5, 7}
