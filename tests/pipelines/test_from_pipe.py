"""A pipeline made from another one takes the cached transformer over, and it goes on skipping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    WanTransformer3DModel,
)

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.pipelines.families import FLUX
from tests.pipelines.families.flux import FLUX_IMAGE_TO_IMAGE
from tests.pipelines.families.sd3 import SD3
from tests.pipelines.family import Family, quiet, run

STEPS = {0, 2}


def cached_pipe(family: Family) -> DiffusionPipeline:
    pipe = family.build()
    pipe.transformer = dit_cache_fx.apply(pipe.transformer, "deepcache", no_cache_steps=STEPS)
    return pipe


@pytest.mark.parametrize("kind", [FluxImg2ImgPipeline, AutoPipelineForImage2Image])
def test_image_to_image_from_text_to_image(kind: type[DiffusionPipeline]) -> None:
    pipe = cached_pipe(FLUX)
    other = quiet(kind.from_pipe(pipe))
    assert isinstance(other, FluxImg2ImgPipeline)
    assert other.transformer is pipe.transformer
    plain = FLUX_IMAGE_TO_IMAGE.build()
    plain.transformer = dit_cache_fx.apply(plain.transformer, "deepcache", no_cache_steps=STEPS)
    got, want = (run(FLUX_IMAGE_TO_IMAGE, p, guided=False, steps=4) for p in (other, plain))
    assert torch.equal(got, want)
    assert [r.action[0] for r in other.transformer.cache_report().timeline] == list("crcr")


def test_back_again_and_another_family() -> None:
    pipe = cached_pipe(FLUX)
    back = FluxPipeline.from_pipe(FluxImg2ImgPipeline.from_pipe(pipe))
    assert back.transformer is pipe.transformer
    pipe = cached_pipe(SD3)
    assert StableDiffusion3Img2ImgPipeline.from_pipe(pipe).transformer is pipe.transformer


def test_its_type_is_equal_to_the_models() -> None:
    cached = cached_pipe(FLUX).transformer
    assert type(cached) in (FluxTransformer2DModel,)
    assert hash(type(cached)) == hash(FluxTransformer2DModel)
    assert type(cached) not in (WanTransformer3DModel,)
    assert issubclass(type(cached), CachedModel)
    assert CachedModel not in (FluxTransformer2DModel, type(cached))
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert isinstance(other, CachedModel)
        assert type(other) == FluxTransformer2DModel  # noqa: E721
