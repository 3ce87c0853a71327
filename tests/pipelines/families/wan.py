"""Wan text-to-video: guidance by two calls a step, each in a cache context."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from tests.pipelines import family
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built, rows
from tests.zoo.diffusers_models import CHANNELS, TEXT_DIM, TEXT_LEN, build_wan

SIZES = ((32, 32), (32, 48))


def build() -> WanPipeline:
    def vae() -> AutoencoderKLWan:
        return AutoencoderKLWan(
            base_dim=3,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * CHANNELS,
            latents_std=[1.5] * CHANNELS,
        )

    return quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=family.built(vae),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=built(build_wan),
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    text = (TEXT_LEN, TEXT_DIM)
    return {
        "prompt_embeds": rows("text", prompt, text, batch, torch.float32),
        "negative_prompt_embeds": rows("no text", prompt, text, batch, torch.float32),
        "height": height,
        "width": width,
        "num_frames": 5,
    }


WAN = Family(
    "Wan",
    build,
    arguments,
    scale("guidance_scale"),
    ("blocks",),
    passes=2,
    many="num_videos_per_prompt",
)
