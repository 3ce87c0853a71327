"""A diffusers pipeline with and without a cache: block calls, difference and report.

The pipeline is a Flux of random weights, so it needs no download: the pictures show nothing, the
counts are what a real one gives. Run: python examples/pipeline.py
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

import dit_cache_fx

STEPS = 50
TEXT_DIM = 32


def tiny_flux() -> FluxPipeline:
    """A `FluxPipeline` with a small transformer and VAE; it takes prompts as embeddings."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=1,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt() -> dict[str, Tensor]:
    """Random numbers in the place of what the two text encoders would give."""
    generator = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, 8, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, TEXT_DIM, generator=generator),
    }


class BlockCalls:
    """Counts how often the blocks of a Flux run."""

    def __init__(self, transformer: Any) -> None:
        self.count = 0
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        self.count += 1


def generate(pipe: FluxPipeline, calls: BlockCalls) -> tuple[Tensor, int]:
    """A picture [1, 3, 32, 32], and how many block calls it took."""
    before = calls.count
    generator = torch.Generator().manual_seed(2)
    images: Tensor = pipe(
        **prompt(),
        height=32,
        width=32,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
    ).images
    return images, calls.count - before


def main() -> None:
    torch.set_num_threads(1)  # the model is too small for more
    pipe = tiny_flux()
    calls = BlockCalls(pipe.transformer)
    plain, plain_calls = generate(pipe, calls)
    print(f"without a cache: {plain_calls} block calls")

    pipe.transformer = dit_cache_fx.apply(
        pipe.transformer, strategy="taylorcache", no_cache_steps=range(0, STEPS, 5)
    )
    cached, cached_calls = generate(pipe, calls)
    print(f"with the cache:  {cached_calls} block calls")
    print(f"largest difference of a pixel: {(cached - plain).abs().max():.4f} of 1\n")
    print(pipe.transformer.cache_report())

    pipe.transformer.disable()
    again, _ = generate(pipe, calls)
    print(f"\ndisabled, it is the same picture again: {torch.equal(again, plain)}")


if __name__ == "__main__":
    main()
