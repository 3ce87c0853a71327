"""Two transformers that share the steps of one run: the second goes on where the first stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import dit_cache_fx
from dit_cache_fx import DitCacheWarning, EvenTimesteps, TaylorCache
from tests.pipelines.blocks import counted
from tests.pipelines.families.wan22 import WAN22
from tests.pipelines.family import run


def computed(pipe: WanPipeline) -> list[int]:
    """The steps of the newest run that its two experts computed, counted in the run."""
    steps = []
    offset = 0
    for cached in (pipe.transformer, pipe.transformer_2):
        timeline = cached.cache_report().timeline
        steps += sorted({offset + r.step for r in timeline if r.action == "computed"})
        offset += len({r.step for r in timeline})
    assert offset == len(pipe.scheduler.timesteps)
    return steps


def boundary_of(pipe: WanPipeline) -> int:
    """The first step of the second expert."""
    bound = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return int((pipe.scheduler.timesteps >= bound).sum())


def planned(pipe: WanPipeline, **options: Any) -> list[int]:
    """The steps of the whole run's plan, and the second expert's first."""
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    course = TaylorCache(**options).course(len(timesteps), timesteps)
    steps = {step for step in range(len(timesteps)) if course.computes(step)}
    return sorted(steps | {boundary_of(pipe)})


@pytest.mark.parametrize(
    "options",
    [
        {"computed_steps": 6},
        {"schedule": EvenTimesteps(5)},
        {"schedule": "fast"},
        {"compute_ratio": 0.3},
        {"no_cache_steps": {0, 3, 6, 10}},
    ],
    ids=str,
)
def test_the_plan_is_the_runs(options: dict[str, Any]) -> None:
    """Of each run, from the first one on, also where another number of steps follows."""
    pipe = dit_cache_fx.apply(WAN22.build(), "taylorcache", **options)
    for steps, seed in ((12, 0), (14, 1), (12, 2)):
        run(WAN22, pipe, steps=steps, seed=seed)
        assert 0 < boundary_of(pipe) < steps
        assert computed(pipe) == planned(pipe, **options)


def test_every_step_computed_is_bitwise_the_uncached_pipeline() -> None:
    pipe = WAN22.build()
    want = run(WAN22, pipe, steps=8)
    dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps=range(8))
    for _ in range(2):
        assert torch.equal(run(WAN22, pipe, steps=8), want)
    dit_cache_fx.restore(pipe)
    assert torch.equal(run(WAN22, pipe, steps=8), want)


def test_blocks_run_as_often_as_planned() -> None:
    pipe = WAN22.build()
    models = pipe.transformer, pipe.transformer_2
    dit_cache_fx.apply(pipe, "deepcache", computed_steps=4)
    run(WAN22, pipe, steps=12)  # its graphs are captured
    with counted(models[0], WAN22.blocks) as first, counted(models[1], WAN22.blocks) as second:
        run(WAN22, pipe, steps=12, seed=1)
    steps, bound = computed(pipe), boundary_of(pipe)
    before = sum(step < bound for step in steps)
    blocks, branches = len(models[0].blocks), 2
    assert first.calls == before * blocks * branches
    assert second.calls == (len(steps) - before) * blocks * branches


def test_options_that_differ() -> None:
    pipe = dit_cache_fx.apply(
        WAN22.build(), "taylorcache", computed_steps=3, transformer_2={"computed_steps": 9}
    )
    run(WAN22, pipe, steps=20)
    few, many = planned(pipe, computed_steps=3), planned(pipe, computed_steps=9)
    bound = boundary_of(pipe)
    assert computed(pipe) == [s for s in few if s < bound] + [s for s in many if s >= bound]


def test_guidance_may_be_switched_off() -> None:
    pipe = dit_cache_fx.apply(WAN22.build(), "taylorcache", computed_steps=5)
    for guided in (True, False, True):
        run(WAN22, pipe, steps=15, guided=guided)
        assert computed(pipe) == planned(pipe, computed_steps=5)


def test_the_second_expert_alone() -> None:
    """Without a boundary only one of both is called: the run is its own."""
    pipe = WAN22.build()
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=4)
    run(WAN22, pipe, steps=10)
    pipe.transformer.reset_states()
    pipe.register_to_config(boundary_ratio=2.0)  # every timestep is below it
    run(WAN22, pipe, steps=9)
    timeline = pipe.transformer_2.cache_report().timeline
    got = sorted({r.step for r in timeline if r.action == "computed"})
    course = TaylorCache(computed_steps=4).course(9, tuple(pipe.scheduler.timesteps.tolist()))
    assert got == [step for step in range(9) if course.computes(step)]
    assert len(got) == 4


def test_a_run_after_one_that_was_broken_off_at_the_boundary() -> None:
    pipe = dit_cache_fx.apply(WAN22.build(), "taylorcache", computed_steps=5)

    def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == bound:
            pipe._interrupt = True
        return given

    run(WAN22, pipe, steps=12)
    bound = boundary_of(pipe)
    run(WAN22, pipe, steps=12, seed=1, callback_on_step_end=stop)
    run(WAN22, pipe, steps=12, seed=2)
    assert computed(pipe) == planned(pipe, computed_steps=5)


@pytest.mark.parametrize("steps", [2, 3])
def test_distilled_to_few_steps_each_expert_computes_what_it_must(steps: int) -> None:
    """One step of the first expert: the next run's, from a sample alike, is none of this run's."""
    pipe = WAN22.build(boundary=0.9)
    plain = WAN22.build(boundary=0.9)
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    noise = torch.randn(1, 4, 2, 4, 4)
    for sample in (noise, noise + 0.1 * torch.randn_like(noise)):
        first = run(WAN22, pipe, steps=steps, latents=sample)
        assert boundary_of(pipe) in (1, 2)
        timeline = pipe.transformer.cache_report().timeline
        assert [r.action for r in timeline if r.step == 0] == ["computed"] * 2
        assert [r.action for r in pipe.transformer_2.cache_report().timeline][:2] == [
            "computed"
        ] * 2
        if steps == 2:
            assert torch.equal(first, run(WAN22, plain, steps=steps, latents=sample))


def test_one_warning_for_both_experts() -> None:
    pipe = dit_cache_fx.apply(WAN22.build(), "taylorcache", schedule="balanced")
    with pytest.warns(DitCacheWarning, match="computes all 4 steps") as warned:
        run(WAN22, pipe, steps=4)
    assert len(warned) == 1
    run(WAN22, pipe, steps=4)


def test_requests_in_sessions() -> None:
    """Two runs in turn, step by step as a server has them: each has its own plan."""
    pipe = dit_cache_fx.apply(WAN22.build(), "taylorcache", computed_steps=5)
    alone = [run(WAN22, pipe, steps=12, seed=seed, prompt=seed) for seed in range(2)]
    for seed in range(2):
        with pipe.transformer.new_session(), pipe.transformer_2.new_session():
            assert torch.equal(run(WAN22, pipe, steps=12, seed=seed, prompt=seed), alone[seed])
            assert computed(pipe) == planned(pipe, computed_steps=5)
