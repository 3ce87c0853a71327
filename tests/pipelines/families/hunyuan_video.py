"""HunyuanVideo: double and single blocks, masked prompts, `true_cfg_scale`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
)

from tests.pipelines import family
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built, rows, text_mask
from tests.zoo.diffusers_models import (
    CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    TEXT_LEN,
    build_hunyuan_video,
)

SIZES = ((32, 32), (32, 48))


def build() -> HunyuanVideoPipeline:
    def vae() -> AutoencoderKLHunyuanVideo:
        return AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=4,
        )

    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=built(build_hunyuan_video),
            vae=family.built(vae),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    height, width = SIZES[size]
    text, float32 = (TEXT_LEN, TEXT_DIM), torch.float32
    return {
        "prompt_embeds": rows("text", prompt, text, batch, float32),
        "pooled_prompt_embeds": rows("pooled", prompt, (POOLED_DIM,), batch, float32),
        "prompt_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "negative_prompt_embeds": rows("no text", prompt, text, batch, float32),
        "negative_pooled_prompt_embeds": rows("no pooled", prompt, (POOLED_DIM,), batch, float32),
        "negative_prompt_attention_mask": text_mask(prompt + 3, TEXT_LEN, batch),
        "height": height,
        "width": width,
        "num_frames": 5,
    }


HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    build,
    arguments,
    scale("true_cfg_scale"),
    ("transformer_blocks", "single_transformer_blocks"),
    passes=2,
    many=None,  # with embeddings given the pipeline does not repeat them
)
