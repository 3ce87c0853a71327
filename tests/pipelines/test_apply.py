"""`apply` and `restore` on a whole pipeline."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning, OptionError, TaylorCache
from tests.pipelines.families import FAMILIES, FLUX, WAN, Family
from tests.pipelines.families.flux import FLUX_IMAGE_TO_IMAGE
from tests.pipelines.families.sd3 import SD3
from tests.pipelines.families.wan22 import WAN22
from tests.pipelines.family import run

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def steps_of(cached: Any) -> list[int]:
    """The computed steps of the newest generation."""
    return sorted({r.step for r in cached.cache_report().timeline if r.action == "computed"})


def refused(words: str) -> Any:
    return pytest.raises(OptionError, match=words)


@each_family
def test_a_pipeline_comes_back_cached_and_restored(family: Family) -> None:
    pipe = family.build()
    model, want = pipe.transformer, run(family, pipe)
    assert dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0, 2, 3}) is pipe
    assert isinstance(pipe.transformer, CachedModel)
    got = run(family, pipe)
    assert steps_of(pipe.transformer) == [0, 2, 3]
    assert not torch.equal(got, want)
    assert dit_cache_fx.restore(pipe) is pipe
    assert pipe.transformer is model
    assert torch.equal(run(family, pipe), want)


@pytest.mark.parametrize("family", [FLUX, SD3, WAN], ids=lambda family: family.name)
def test_presets_and_numbers_of_steps_go_by_the_schedulers_timesteps(family: Family) -> None:
    """From the first generation on, and in another number of steps."""
    pipe = dit_cache_fx.apply(family.build(), "taylorcache", computed_steps=4)
    for steps in (12, 9):
        run(family, pipe, steps=steps, size=0)
        timesteps = pipe.scheduler.timesteps.tolist()
        assert len(timesteps) == steps
        course = TaylorCache(computed_steps=4).course(steps, tuple(timesteps))
        want = [step for step in range(steps) if course.computes(step)]
        assert steps_of(pipe.transformer) == want
        assert len(want) == 4
        assert want[-1] == steps - 1


def test_image_to_image_begins_later() -> None:
    family = FLUX_IMAGE_TO_IMAGE
    pipe = dit_cache_fx.apply(family.build(), "taylorcache", computed_steps=3)
    run(family, pipe, steps=8)  # of 16 that are asked for
    computed = steps_of(pipe.transformer)
    assert len(computed) == 3
    assert (computed[0], computed[-1]) == (0, 7)


def test_the_users_own_timesteps_and_number_go_before_the_pipelines() -> None:
    told = [1000.0 - 10 * i for i in range(6)]
    pipe = dit_cache_fx.apply(FLUX.build(), "deepcache", computed_steps=2, timesteps=told)
    assert pipe.transformer._call_log.count.told_timesteps() == tuple(told)
    dit_cache_fx.restore(pipe)
    dit_cache_fx.apply(pipe, TaylorCache(computed_steps=3))
    run(FLUX, pipe, steps=8)
    assert len(steps_of(pipe.transformer)) == 3


def test_a_run_again_from_a_sample_that_resembles_the_last_one() -> None:
    """A pipeline of one step: a second run at the same timestep is no second step of the first."""
    pipe = SD3.build()
    model = pipe.transformer
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    noise = torch.randn(1, 4, 8, 8)
    for sample in (noise, noise + 0.1 * torch.randn_like(noise)):
        got = run(SD3, pipe, steps=1, latents=sample)
        cached, pipe.transformer = pipe.transformer, model
        assert torch.equal(got, run(SD3, pipe, steps=1, latents=sample))
        pipe.transformer = cached
    assert cached.cache_report().calls_reused == 0


# --- few steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_a_preset_says_that_four_steps_leave_nothing_to_gain(preset: str) -> None:
    pipe = dit_cache_fx.apply(FLUX.build(), "taylorcache", schedule=preset)
    with pytest.warns(DitCacheWarning, match="computes all 4 steps .* a cache gains nothing"):
        run(FLUX, pipe, steps=4)
    got = run(FLUX, pipe, steps=4)  # and says it once
    assert steps_of(pipe.transformer) == [0, 1, 2, 3]
    assert torch.equal(got, run(FLUX, dit_cache_fx.restore(pipe), steps=4))


@pytest.mark.parametrize(("preset", "number"), [("fast", 6), ("balanced", 7)])
def test_of_eight_steps_a_preset_leaves_some_out(preset: str, number: int) -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "taylorcache", schedule=preset)
    run(SD3, pipe, steps=8)
    computed = steps_of(pipe.transformer)
    assert (len(computed), computed[0], computed[-1]) == (number, 0, 7)


def test_quality_leaves_none_out_of_eight() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "taylorcache", schedule="quality")
    with pytest.warns(DitCacheWarning, match="all 8 steps"):
        run(SD3, pipe, steps=8)


def test_a_run_shorter_than_the_number_of_computed_steps_computes_them_all() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "taylorcache", computed_steps=6)
    with pytest.warns(DitCacheWarning, match="computes all 4 steps"):
        run(SD3, pipe, steps=4)
    assert steps_of(pipe.transformer) == [0, 1, 2, 3]
    run(SD3, pipe, steps=9)
    assert len(steps_of(pipe.transformer)) == 6
    pipe.transformer.num_steps = 4  # the user says so beforehand
    pipe.transformer.timesteps = pipe.scheduler.timesteps[:4]
    with refused("computed_steps=6: .* from 1 to 4"):
        run(SD3, pipe, steps=4)


def test_steps_that_the_user_lists_are_not_judged() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "taylorcache", no_cache_steps=range(4))
    run(SD3, pipe, steps=4)
    dit_cache_fx.apply(dit_cache_fx.restore(pipe), "taylorcache", computed_steps=4)
    run(SD3, pipe, steps=4)


# --- together with --------------------------------------------------------------------------------


def test_restored_while_offloaded() -> None:
    pytest.importorskip("accelerate")
    pipe = SD3.build()
    model, want = pipe.transformer, run(SD3, pipe)
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    pipe.enable_model_cpu_offload(device="cpu")
    run(SD3, pipe)
    dit_cache_fx.restore(pipe)
    assert pipe.transformer is model
    assert model._hf_hook is not None  # it is still offloaded
    assert torch.equal(run(SD3, pipe), want)


def test_restored_behind_torch_compile() -> None:
    pipe = SD3.build()
    model = pipe.transformer
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with refused("cached already"):
        dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    assert dit_cache_fx.restore(pipe).transformer is model


def test_restore_frees_what_is_held() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "deepcache", no_cache_steps={0})
    run(SD3, pipe, steps=2)
    cached = pipe.transformer
    assert cached.cache_report().bytes_held > 0
    assert dit_cache_fx.restore(cached) is cached._model
    assert cached.cache_report().bytes_held == 0
    dit_cache_fx.restore(pipe)
    assert dit_cache_fx.restore(pipe) is pipe  # nothing is left to do
    assert dit_cache_fx.restore(pipe.transformer) is pipe.transformer


def test_the_cache_keeps_no_pipeline_alive() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "deepcache", computed_steps=3)
    cached, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(7)
    gone = ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    # a pipeline that was made from it has its scheduler
    assert cached._call_log.count.told_timesteps() == tuple(scheduler.timesteps.tolist())


def test_copies_of_a_pipeline_are_apart() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "deepcache", no_cache_steps={0, 3})
    want = run(SD3, pipe, steps=5)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.transformer is not pipe.transformer
        assert torch.equal(run(SD3, other, steps=5), want)


# --- options of one transformer alone -------------------------------------------------------------


def test_options_of_one_transformer() -> None:
    pipe = dit_cache_fx.apply(
        WAN22.build(),
        "taylorcache",
        schedule="fast",
        max_order=1,
        check=False,
        transformer_2={"computed_steps": 5, "blocks": ["blocks"]},
    )
    first, second = (t._call_log.strategy for t in (pipe.transformer, pipe.transformer_2))
    assert (first.schedule, first.computed_steps, first.max_order) == ("fast", None, 1)
    assert (second.schedule, second.computed_steps, second.max_order) == (None, 5, 1)
    assert pipe.transformer_2._engine.subject.blocks == ("blocks",)
    assert not pipe.transformer_2._engine.subject.check


def test_a_strategy_of_one_transformer() -> None:
    """It has those of the common options that it knows."""
    own: dict[str, Any] = {"strategy": "deepcache", "no_cache_block_id": {"blocks": {1}}}
    pipe = dit_cache_fx.apply(
        WAN22.build(), "taylorcache", schedule="fast", max_order=1, transformer_2=own
    )
    first, second = (t._call_log.strategy for t in (pipe.transformer, pipe.transformer_2))
    assert (first.name, first.no_cache_block_id) == ("taylorcache", None)
    assert (second.name, second.schedule) == ("deepcache", "fast")
    assert second.no_cache_block_id == {"blocks": {1}}


def test_options_beside_an_object() -> None:
    common = TaylorCache(schedule="fast", max_order=1)
    pipe = dit_cache_fx.apply(WAN22.build(), common, transformer_2={"compute_ratio": 0.5})
    second = pipe.transformer_2._call_log.strategy
    assert pipe.transformer._call_log.strategy is common
    assert (second.schedule, second.compute_ratio, second.max_order) == (None, 0.5, 1)


def test_a_transformer_left_out() -> None:
    pipe = WAN22.build()
    second = pipe.transformer_2
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0}, transformer_2=False)
    assert pipe.transformer_2 is second
    assert isinstance(pipe.transformer, CachedModel)
    with refused("at least one transformer to cache"):
        dit_cache_fx.apply(SD3.build(), "deepcache", no_cache_steps={0}, transformer=False)


# --- what cannot be -------------------------------------------------------------------------------


def unet_pipeline() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def test_a_pipeline_without_a_transformer() -> None:
    with refused(r"model='DDPMPipeline': .*it has unet \(UNet2DModel\)"):
        dit_cache_fx.apply(unet_pipeline(), "deepcache", no_cache_steps={0})
    with refused("DDPMPipeline"):
        dit_cache_fx.restore(unet_pipeline())
    empty = SimpleNamespace(transformer=None)
    with refused("its .transformer; here that is None, not a loaded model"):
        dit_cache_fx.apply(empty, "deepcache", no_cache_steps={0})
    with refused("model='str': an nn.Module, or a pipeline"):
        dit_cache_fx.apply("flux", "deepcache", no_cache_steps={0})


def test_a_model_that_the_pipeline_does_not_have() -> None:
    with refused(r"transformer_2=.*: FluxPipeline has no such model; it has \['transformer'\]"):
        dit_cache_fx.apply(
            FLUX.build(), "deepcache", no_cache_steps={0}, transformer_2={"compute_ratio": 0.5}
        )


def test_options_that_are_none() -> None:
    with refused("transformer_2='fast': the options of this transformer alone"):
        dit_cache_fx.apply(WAN22.build(), "deepcache", no_cache_steps={0}, transformer_2="fast")
    with refused("deepcache has no such option"):
        dit_cache_fx.apply(
            WAN22.build(), "deepcache", no_cache_steps={0}, transformer_2={"order": 2}
        )
    with refused("an object has its options already"):
        dit_cache_fx.apply(WAN22.build(), TaylorCache(schedule="fast"), transformer={"order": 2})


def test_nothing_is_cached_where_one_of_two_cannot_be() -> None:
    pipe = WAN22.build()
    models = pipe.transformer, pipe.transformer_2
    pipe.transformer_2.train()
    with refused("eval"):
        dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    assert (pipe.transformer, pipe.transformer_2) == models


def test_applied_twice() -> None:
    pipe = dit_cache_fx.apply(SD3.build(), "deepcache", no_cache_steps={0})
    with refused(r"its transformer is cached already: call dit_cache_fx.restore\(pipe\) first"):
        dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps={0})
    dit_cache_fx.apply(dit_cache_fx.restore(pipe), "taylorcache", no_cache_steps={0})
    assert pipe.transformer._call_log.strategy.name == "taylorcache"


def test_mixed_with_caching_by_hand_and_with_diffusers_caches() -> None:
    pipe = WAN22.build()
    pipe.transformer_2 = dit_cache_fx.apply(pipe.transformer_2, "deepcache", no_cache_steps={0})
    with refused("its transformer_2 is cached already"):
        dit_cache_fx.apply(pipe, "deepcache", no_cache_steps={0})
    diffusers = pytest.importorskip("diffusers")
    flux = FLUX.build()
    flux.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with refused(r"a cache of diffusers is enabled on it: call its disable_cache\(\) first"):
        dit_cache_fx.apply(flux, "deepcache", no_cache_steps={0})
    flux.transformer.disable_cache()
    dit_cache_fx.apply(flux, "deepcache", no_cache_steps={0})
