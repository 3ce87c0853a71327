"""HunyuanVideo-1.5: two masked text streams, guidance by an object that the pipeline holds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
)

from tests.pipelines import family
from tests.pipelines.family import Family, quiet
from tests.zoo.case import built, rows, text_mask
from tests.zoo.diffusers_models import (
    CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    TEXT_LEN,
    build_hunyuan_video15,
)

SIZES = ((64, 64), (64, 96))


def build() -> HunyuanVideo15Pipeline:
    def vae() -> AutoencoderKLHunyuanVideo15:
        return AutoencoderKLHunyuanVideo15(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        )

    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=built(build_hunyuan_video15),
        vae=family.built(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.vision_num_semantic_tokens = 4
    return quiet(pipe)


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    text, glyphs, float32 = (TEXT_LEN, TEXT_DIM), (6, POOLED_DIM), torch.float32
    return {
        "prompt_embeds": rows("text", prompt, text, batch, float32),
        "prompt_embeds_mask": text_mask(prompt, TEXT_LEN, batch),
        "prompt_embeds_2": rows("glyphs", prompt, glyphs, batch, float32),
        "prompt_embeds_mask_2": text_mask(prompt, 6, batch),
        "negative_prompt_embeds": rows("no text", prompt, text, batch, float32),
        "negative_prompt_embeds_mask": text_mask(prompt + 3, TEXT_LEN, batch),
        "negative_prompt_embeds_2": rows("no glyphs", prompt, glyphs, batch, float32),
        "negative_prompt_embeds_mask_2": text_mask(prompt + 1, 6, batch),
        "height": height,
        "width": width,
        "num_frames": 5,
    }


def guidance(pipe: DiffusionPipeline, on: bool) -> dict[str, Any]:
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0 if on else 1.0)
    return {}


HUNYUAN_VIDEO15 = Family(
    "HunyuanVideo-1.5",
    build,
    arguments,
    guidance,
    passes=2,
    many=None,  # the pipeline does not repeat the image embeddings
    callback=None,
)
