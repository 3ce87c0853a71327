"""Flux: text-to-image and image-to-image, guidance by a second call a step (`true_cfg_scale`)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline

from tests.pipelines.family import Family, image_vae, quiet, scale
from tests.zoo.case import built, rows
from tests.zoo.diffusers_models import CHANNELS, POOLED_DIM, SIZES, TEXT_DIM, TEXT_LEN, build_flux


def build() -> FluxPipeline:
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=image_vae(CHANNELS),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=built(build_flux),
        )
    )


def build_image_to_image() -> FluxImg2ImgPipeline:
    return quiet(FluxImg2ImgPipeline(**build().components))


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    float32 = torch.float32
    height, width = SIZES[size]
    return {
        "prompt_embeds": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, float32),
        "pooled_prompt_embeds": rows("pooled", prompt, (POOLED_DIM,), batch, float32),
        "negative_prompt_embeds": rows("no text", prompt, (TEXT_LEN, TEXT_DIM), batch, float32),
        "negative_pooled_prompt_embeds": rows("no pooled", prompt, (POOLED_DIM,), batch, float32),
        "height": height,
        "width": width,
    }


def image_arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    """With a picture to start from."""
    picture = rows("picture", prompt, (3, *SIZES[size]), 1, torch.float32).sigmoid()
    return {**arguments(prompt, size, batch), "image": picture}


BLOCKS = ("transformer_blocks", "single_transformer_blocks")
FLUX = Family("Flux", build, arguments, scale("true_cfg_scale"), BLOCKS, passes=2)
FLUX_IMAGE_TO_IMAGE = Family(
    "Flux image-to-image",
    build_image_to_image,
    image_arguments,
    scale("true_cfg_scale"),
    BLOCKS,
    passes=2,
    asked=2,
    fixed={"strength": 0.5},  # the second half of the steps
)
