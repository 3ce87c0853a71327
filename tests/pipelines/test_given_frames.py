"""Pipelines whose timesteps are not the scheduler's: one for each token, or in another unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LTXImageToVideoPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    WanImageToVideoPipeline,
)
from torch import Tensor

import dit_cache_fx
from tests.pipelines.families import ltx, wan
from tests.pipelines.family import quiet
from tests.zoo.case import built, rows

STEPS, COMPUTED = 8, 4


def picture(prompt: int, height: int, width: int) -> Tensor:
    return rows("picture", prompt, (3, height, width), 1, torch.float32).sigmoid()


def image_to_video() -> tuple[DiffusionPipeline, Any]:
    """Tokens of the first frame have the timestep 0."""
    pipe = quiet(LTXImageToVideoPipeline(**ltx.build().components))

    def arguments(prompt: int) -> dict[str, Any]:
        given = ltx.arguments(prompt)
        return given | {"image": picture(prompt, given["height"], given["width"])}

    return pipe, arguments


def image_to_video_in_one_sample() -> tuple[DiffusionPipeline, Any]:
    """Wan2.2's small model: the same, and the picture is a frame of the sample."""
    pipe = quiet(WanImageToVideoPipeline(**wan.build().components, expand_timesteps=True))

    def arguments(prompt: int) -> dict[str, Any]:
        given = wan.arguments(prompt)
        return given | {"image": picture(prompt, given["height"], given["width"])}

    return pipe, arguments


def consistency() -> tuple[DiffusionPipeline, Any]:
    """The scheduler's timesteps are angles and end in a 0 that is no call; the model's are not."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 8,
        "patch_size": 1,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    }
    transformer = built(lambda: SanaTransformer2DModel(**config))
    pipe = quiet(SanaSprintPipeline(None, None, None, transformer, SCMScheduler()))

    def arguments(prompt: int) -> dict[str, Any]:
        return {
            "prompt": None,
            "prompt_embeds": rows("text", prompt, (8, 12), 1, torch.float32),
            "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long),
            "height": 256,
            "width": 256,
            "use_resolution_binning": False,
            "intermediate_timesteps": None,
        }

    return pipe, arguments


def run(pipe: DiffusionPipeline, arguments: Any, prompt: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(prompt)
        made = pipe(
            **arguments(prompt),
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(prompt),
            output_type="latent",
            return_dict=False,
        )[0]
    return torch.as_tensor(made)


def computed(pipe: DiffusionPipeline) -> list[int]:
    timeline = pipe.transformer.cache_report().timeline
    assert {r.step for r in timeline} == set(range(STEPS))
    return sorted({r.step for r in timeline if r.action == "computed"})


@pytest.mark.parametrize("build", [image_to_video, image_to_video_in_one_sample, consistency])
def test_every_step_computed_is_the_model(build: Any) -> None:
    pipe, arguments = build()
    want = [run(pipe, arguments, prompt) for prompt in range(2)]
    dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps=range(STEPS))
    for prompt in (0, 1, 0):
        assert torch.equal(run(pipe, arguments, prompt), want[prompt])
    dit_cache_fx.restore(pipe)
    assert torch.equal(run(pipe, arguments, 0), want[0])


@pytest.mark.parametrize("build", [image_to_video, image_to_video_in_one_sample])
def test_computed_steps_come_by_the_schedulers_timesteps(build: Any) -> None:
    """From the first run on, and without a warning."""
    pipe, arguments = build()
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=COMPUTED)
    for prompt in (0, 1):
        run(pipe, arguments, prompt)
        timesteps = tuple(pipe.scheduler.timesteps.tolist())
        course = dit_cache_fx.TaylorCache(computed_steps=COMPUTED).course(STEPS, timesteps)
        assert computed(pipe) == [step for step in range(STEPS) if course.computes(step)]


def test_a_run_whose_first_timestep_is_one_is_a_whole_run() -> None:
    """It does not begin at the end of the scheduler's timesteps."""
    pipe, arguments = consistency()
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=COMPUTED)
    for prompt in (0, 1):
        run(pipe, arguments, prompt)
        steps = computed(pipe)
        assert steps[0] == 0
        assert len(steps) >= COMPUTED - 1  # the last one may be the 0 behind the calls
