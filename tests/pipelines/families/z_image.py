"""Z-Image: lists of samples and of prompts, timesteps that rise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from tests.pipelines.family import Family, image_vae, quiet
from tests.zoo.case import built, rows
from tests.zoo.diffusers_models import CHANNELS, SIZES, TEXT_DIM, build_z_image


def build() -> ZImagePipeline:
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=image_vae(CHANNELS),
            text_encoder=None,
            tokenizer=None,
            transformer=built(build_z_image),
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    return {
        "prompt_embeds": _prompts("text", prompt, batch),
        "negative_prompt_embeds": _prompts("no text", prompt, batch),
        "height": height,
        "width": width,
    }


def _prompts(what: str, prompt: int, batch: int) -> list[torch.Tensor]:
    """Of one length, as a capture for each combination of lengths takes long."""
    return list(rows(what, prompt, (20, TEXT_DIM), batch, torch.float32))


def guidance(pipe: Any, on: bool) -> dict[str, float]:
    return {"guidance_scale": 3.0 if on else 0.0}


Z_IMAGE = Family("Z-Image", build, arguments, guidance, ("layers",))
