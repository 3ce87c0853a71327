"""CogVideoX: DDIM steps, both branches of guidance in one batch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

from tests.pipelines import family
from tests.pipelines.families.wan import SIZES
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built, rows
from tests.zoo.diffusers_models import CHANNELS, TEXT_DIM, TEXT_LEN, build_cogvideox


def build() -> CogVideoXPipeline:
    def vae() -> AutoencoderKLCogVideoX:
        return AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
        )

    return quiet(
        CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=family.built(vae),
            transformer=built(build_cogvideox),
            scheduler=CogVideoXDDIMScheduler(),
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


COGVIDEOX = Family(
    "CogVideoX",
    build,
    arguments,
    scale("guidance_scale"),
    many=None,  # the pipeline makes one whatever is asked for
)
