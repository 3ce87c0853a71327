"""LTX-Video: both branches of guidance in one batch, masked prompts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline

from tests.pipelines import family
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built, rows, text_mask
from tests.zoo.diffusers_models import CHANNELS, TEXT_DIM, TEXT_LEN, build_ltx

SIZES = ((64, 64), (64, 96))


def build() -> LTXPipeline:
    def vae() -> AutoencoderKLLTXVideo:
        return AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )

    return quiet(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=family.built(vae),
            text_encoder=None,
            tokenizer=None,
            transformer=built(build_ltx),
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
        "num_frames": 9,
    }


#: with embeddings given the pipeline does not repeat them for several videos
LTX = Family("LTX", build, arguments, scale("guidance_scale"), many=None)
