"""QwenImage: guidance by a second call a step (`true_cfg_scale`), prompts of any length."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from tests.pipelines import family
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built, rows, text_mask
from tests.zoo.diffusers_models import CHANNELS, TEXT_DIM, TEXT_LEN, build_qwen_image

SIZES = ((16, 16), (16, 32))


def build() -> QwenImagePipeline:
    def vae() -> AutoencoderKLQwenImage:
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * CHANNELS,
            latents_std=[1.5] * CHANNELS,
        )

    return quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=family.built(vae),
            text_encoder=None,
            tokenizer=None,
            transformer=built(build_qwen_image),
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    text = (TEXT_LEN, TEXT_DIM)
    return {
        "prompt_embeds": rows("text", prompt, text, batch, torch.float32),
        "prompt_embeds_mask": text_mask(prompt, TEXT_LEN, batch),
        "negative_prompt_embeds": rows("no text", prompt, text, batch, torch.float32),
        "negative_prompt_embeds_mask": text_mask(prompt + 3, TEXT_LEN, batch),
        "height": height,
        "width": width,
    }


QWEN_IMAGE = Family("QwenImage", build, arguments, scale("true_cfg_scale"), passes=2)
