"""What a tiny pipeline offers to the tests, and how one of its generations is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from tests.zoo.case import redraw

STEPS = 5


@dataclass(frozen=True, eq=False)
class Family:
    """One pipeline class: how to build it tiny and how to call it.

    `arguments(prompt=0, size=0, batch=1)` gives the arguments of a call: both prompts as embeddings
    drawn from the number `prompt`, one of two resolutions. `guidance(pipe, on)` gives those that
    switch guidance. `passes`: calls of the transformer in a guided step. `many`: the name of the
    argument for several results of one prompt.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    arguments: Callable[..., dict[str, Any]]
    guidance: Callable[[DiffusionPipeline, bool], Mapping[str, Any]]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    passes: int = 1
    many: str | None = "num_images_per_prompt"
    latent: str = "latent"  # the output type that is the cheapest
    callback: str | None = "callback_on_step_end"
    interrupts: bool = True
    asked: int = 1  # steps to ask for, for each step that is run
    fixed: Mapping[str, Any] = field(default_factory=dict)  # of every call


def run(
    family: Family,
    pipe: DiffusionPipeline,
    *,
    steps: int = STEPS,
    guided: bool = True,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    seed: int = 0,
    decoded: bool = False,
    **more: Any,
) -> Tensor:
    """What one generation gives: its latents, or where `decoded` its pictures."""
    arguments = {
        "num_inference_steps": steps * family.asked,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt" if decoded else family.latent,
        **family.fixed,
        **family.arguments(prompt=prompt, size=size, batch=batch),
        **family.guidance(pipe, guided),
        **more,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some pipelines encode a picture with it
        result = pipe(**arguments, return_dict=False)[0]
    return torch.as_tensor(result)


def scale(name: str, on: float = 3.0) -> Callable[[DiffusionPipeline, bool], dict[str, Any]]:
    """Guidance that is switched by an argument."""

    def guidance(pipe: DiffusionPipeline, guided: bool) -> dict[str, Any]:
        return {name: on if guided else 1.0}

    return guidance


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def built(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """A VAE or an encoder for inference; its results differ where its inputs do."""
    with torch.random.fork_rng(devices=[]):
        module = make()
    redraw(module, seed)
    return module.eval()


def image_vae(channels: int) -> AutoencoderKL:
    """A VAE whose latents have the picture's own resolution."""
    return built(
        lambda: AutoencoderKL(
            block_out_channels=(4,),
            latent_channels=channels,
            norm_num_groups=1,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
