"""DiT: class labels, both branches of guidance in one batch, one resolution."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.pipelines.family import Family, image_vae, quiet, scale
from tests.zoo.case import built
from tests.zoo.diffusers_models import CHANNELS, HEAD_DIM, HEADS


def build() -> DiTPipeline:
    def transformer() -> DiTTransformer2DModel:
        return DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=3,
            sample_size=8,
            num_embeds_ada_norm=1000,  # the pipeline's label for no class
        )

    return quiet(
        DiTPipeline(
            transformer=built(transformer), vae=image_vae(CHANNELS), scheduler=DDIMScheduler()
        )
    )


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    return {"class_labels": [prompt + row for row in range(batch)]}


DIT = Family(
    "DiT",
    build,
    arguments,
    scale("guidance_scale"),
    many=None,
    latent="pt",
    callback=None,
    interrupts=False,
)
