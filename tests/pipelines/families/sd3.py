"""Stable Diffusion 3: both branches of guidance in one batch."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tests.pipelines.families.flux import arguments
from tests.pipelines.family import Family, image_vae, quiet, scale
from tests.zoo.case import built
from tests.zoo.diffusers_models import CHANNELS, build_sd3


def build() -> StableDiffusion3Pipeline:
    return quiet(
        StableDiffusion3Pipeline(
            transformer=built(build_sd3),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=image_vae(CHANNELS),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


#: with embeddings given the pipeline does not repeat them for several pictures
SD3 = Family("SD3", build, arguments, scale("guidance_scale"), many=None)
