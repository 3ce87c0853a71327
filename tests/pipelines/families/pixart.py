"""PixArt: both branches of guidance in one batch, a callback of the older kind."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

from tests.pipelines.family import Family, image_vae, quiet, scale
from tests.zoo.case import built, rows, text_mask
from tests.zoo.diffusers_models import CHANNELS, TEXT_DIM, TEXT_LEN, build_pixart

SIZES = ((8, 8), (8, 16))


def build() -> PixArtAlphaPipeline:
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=image_vae(CHANNELS),
            transformer=built(build_pixart),
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    text = (TEXT_LEN, TEXT_DIM)
    return {
        "prompt_embeds": rows("text", prompt, text, batch, torch.float32),
        "prompt_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "negative_prompt_embeds": rows("no text", prompt, text, batch, torch.float32),
        "negative_prompt_attention_mask": text_mask(prompt + 3, TEXT_LEN, batch),
        "height": height,
        "width": width,
    }


PIXART = Family(
    "PixArt",
    build,
    arguments,
    scale("guidance_scale"),
    callback="callback",
    interrupts=False,
    fixed={"negative_prompt": None, "use_resolution_binning": False},
)
