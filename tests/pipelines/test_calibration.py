"""`calibrate` with diffusers pipelines: the plans hold in generations that it has not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_cache_fx
from tests.pipelines.families import FLUX, WAN, Family
from tests.pipelines.family import run

STEPS = 8


def db(got: Any, want: Any) -> float:
    peak = want.max() - want.min()
    return float(-10 * torch.log10((got - want).square().mean() / peak**2))


def generated(family: Family, pipe: Any, transformer: Any, seed: int) -> torch.Tensor:
    pipe.transformer = transformer
    return run(family, pipe, steps=STEPS, seed=seed)


@pytest.mark.parametrize("family", [FLUX, WAN], ids=lambda family: family.name)
def test_a_plan_is_ahead_of_the_preset_on_other_seeds(family: Family) -> None:
    """Wan calls its transformer once for each branch of CFG."""
    pipe = family.build()
    model = pipe.transformer
    pipe.transformer = cached = dit_cache_fx.apply(model, "taylorcache", computed_steps=3)
    runs = [lambda seed=seed: run(family, pipe, steps=STEPS, seed=seed) for seed in (0, 1)]
    front = dit_cache_fx.calibrate(cached, runs, 3, progress=False)
    assert pipe.transformer is cached
    assert len(front.timesteps) == STEPS
    want = generated(family, pipe, model, 7)
    plan = dit_cache_fx.apply(model, front.plan(3))
    preset = dit_cache_fx.apply(
        model, "taylorcache", computed_steps=3, timesteps=lambda: pipe.scheduler.timesteps
    )
    got = {kind: db(generated(family, pipe, kind, 7), want) for kind in (plan, preset)}
    assert got[plan] > got[preset] + 1
    report = plan.cache_report()
    assert (report.steps_computed, report.steps_reused) == (3, 5)


def test_pictures_of_pil() -> None:
    pipe = FLUX.build()
    model = pipe.transformer
    pipe.transformer = cached = dit_cache_fx.apply(model, "taylorcache", computed_steps=3)

    def pictures() -> Any:
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "pil"}
        return pipe(**FLUX.arguments(), **settings, generator=generator).images

    front = dit_cache_fx.calibrate(cached, [pictures], 4, progress=False)
    assert front.rows[0].psnr == 120.0
    assert front.rows[0].plan.schedule.steps == {0, 1, 2, 3}  # type: ignore[union-attr]
