"""What a pipeline hands to the transformer beside the prompt: ControlNet, IP-Adapter, changes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from torch import Tensor

from dit_cache_fx import DitCacheWarning
from tests.pipelines.families import FLUX, SD3
from tests.pipelines.families.flux import FLUX_IMAGE_TO_IMAGE
from tests.pipelines.family import quiet
from tests.pipelines.session import Session
from tests.zoo.case import built, rows


def picture() -> Tensor:
    return rows("control", 0, (3, 8, 8), 1, torch.float32).sigmoid()


def test_flux_controlnet() -> None:
    pipe = FLUX.build()
    config = dict(pipe.transformer.config) | {"num_layers": 2, "num_single_layers": 1}
    net = built(lambda: FluxControlNetModel.from_config(config))
    pipe = quiet(FluxControlNetPipeline(**pipe.components, controlnet=net))
    session = Session(FLUX, pipe=pipe)
    call = {"control_image": picture(), "guided": False}
    with session.cached.cache_context("control"):  # what varies with each step is known in one
        session.check_nothing_stale("control", **call)
        session.check_nothing_stale("another prompt", prompt=1, **call)
        session.check_nothing_stale("weaker", controlnet_conditioning_scale=0.5, **call)
    assert not torch.equal(
        session.plain(**call), session.plain(controlnet_conditioning_scale=0.5, **call)
    )


def test_sd3_controlnet() -> None:
    pipe = SD3.build()
    config = dict(pipe.transformer.config) | {"num_layers": 2, "dual_attention_layers": ()}
    net = built(lambda: SD3ControlNetModel.from_config(config))
    pipe = quiet(StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net))
    session = Session(SD3, pipe=pipe)
    with session.cached.cache_context("control"):
        session.check_nothing_stale("control", control_image=picture())
    session.computed = range(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitCacheWarning)
        every = {"control_image": picture(), "control_guidance_end": 0.5}
        assert torch.equal(session.cache(**every), session.plain(**every))  # outside: all computed


def test_sd3_guidance_that_skips_layers() -> None:
    """A third call in some steps, without one of the blocks: a graph of its own."""
    session = Session(SD3, computed={0, 3})
    call = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7}
    with session.counts() as count:
        session.cache(**call)
    # steps 0 and 3; the third call in steps 1 (its first) and 3, of the two other blocks
    assert count.calls == 2 * session.depth + 2 * (session.depth - 1)
    session.computed = range(5)
    whole = Session(SD3, computed=range(5), pipe=session.pipe)
    whole.model = session.model
    assert torch.equal(whole.cache(**call), whole.plain(**call))


def test_flux_ip_adapter() -> None:
    pipe = FLUX.build()
    model = pipe.transformer
    model._load_ip_adapter_weights([ip_adapter_weights(model)])
    session = Session(FLUX, pipe=pipe)
    images = {
        "ip_adapter_image_embeds": [rows("image", 0, (1, 16), 1, torch.float32)],
        "negative_ip_adapter_image_embeds": [rows("no image", 0, (1, 16), 1, torch.float32)],
    }
    others = {name: [tensor[0] + 1] for name, tensor in images.items()}
    session.check("images", **images)
    session.check("other images", **others)
    session.check("unguided", guided=False, **images)
    assert not torch.equal(session.plain(**images), session.plain(**others))


def ip_adapter_weights(model: Any) -> dict[str, dict[str, Tensor]]:
    """An adapter for image embeddings of 16 numbers, as 4 tokens."""
    width, text = model.inner_dim, model.config.joint_attention_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    blocks = {}
    for index in range(len(model.transformer_blocks)):
        for part in ("k", "v"):
            blocks[f"{index}.to_{part}_ip.weight"] = draw(width, text)
            blocks[f"{index}.to_{part}_ip.bias"] = draw(width)
    projection = {
        "proj.weight": draw(4 * text, 16),
        "proj.bias": draw(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": projection, "ip_adapter": blocks}


# --- one transformer, changing uses ---------------------------------------------------------------


def test_text_to_image_and_image_to_image_with_one_transformer() -> None:
    """The second pipeline starts in the middle of the timesteps, with the same prompt's tensors."""
    session = Session(FLUX)
    second = Session(
        FLUX_IMAGE_TO_IMAGE, pipe=quiet(FluxImg2ImgPipeline(**session.pipe.components))
    )
    second.cached = session.cached
    prompt = FLUX.arguments()
    for _ in range(2):
        session.check("text to image", **prompt)
        second.check("image to image", **prompt)

    def interrupt(pipe: Any, step: int, timestep: Tensor, given: Any) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    session.cache(callback_on_step_end=interrupt, **prompt)
    got = second.cache(**prompt)
    steps = session.cached.cache_report().timeline[-10:]
    computed = {i for i, record in enumerate(steps) if record.action == "computed"}
    assert {0, 1} <= computed
    assert torch.equal(got, second.by_hand(computed, **prompt))


def test_guidance_that_a_callback_switches_off() -> None:
    """As diffusers' guide does it: from a step on one half of the batch is left."""
    session = Session(SD3)

    def switch(pipe: Any, step: int, timestep: Tensor, given: Any) -> dict[str, Any]:
        if step != 3:
            return given
        pipe._guidance_scale = 0.0
        return {**given, **{name: given[name][-1:] for name in names}}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    call = {
        "callback_on_step_end": switch,
        "callback_on_step_end_tensor_inputs": ["latents", *names],
    }
    with session.counts() as count:
        got = session.cache(**call)
    # step 4 would reuse, but for its batch nothing is held
    assert count.calls == (len(session.computed) + 1) * session.depth
    assert torch.equal(got, session.by_hand({0, 2, 3, 4}, **call))


def test_a_prompt_that_a_callback_changes() -> None:
    """The step after the change is computed, whatever the schedule says."""
    session = Session(FLUX, computed={0, 4})

    def change(pipe: Any, step: int, timestep: Tensor, given: Any) -> dict[str, Any]:
        return {"prompt_embeds": given["prompt_embeds"] * 2} if step == 1 else {}

    call = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "guided": False,
    }
    got = session.cache(**call)
    assert torch.equal(got, session.by_hand({0, 2, 4}, **call))
