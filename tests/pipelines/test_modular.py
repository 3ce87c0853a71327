"""diffusers' modular pipelines and their guiders, which call the transformer once for each pass.

Passes of guidance that perturbs the model have the very same arguments: hooks on its layers make
the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LayerSkipConfig,
    ModularPipeline,
    SkipLayerGuidance,
)
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from dit_cache_fx.runtime.tracking.hooks import Hooked, Hooks
from tests.pipelines.blocks import blocks_of, replaced_forwards
from tests.pipelines.families import flux, wan
from tests.pipelines.families.wan22 import build as build_wan22
from tests.reference import copied
from tests.toys import TOY, ByHand, ToyDiT, actions, generation, make

modular = pytest.importorskip("diffusers.modular_pipelines")
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep  # noqa: E402
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep  # noqa: E402
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep  # noqa: E402

STEPS, COMPUTED = 6, frozenset({0, 3, 5})


def skipped() -> LayerSkipConfig:
    return LayerSkipConfig(indices=[1], fqn="blocks")


GUIDERS: dict[str, tuple[Callable[[], Any], int]] = {
    "classifier-free": (lambda: ClassifierFreeGuidance(guidance_scale=3.0), 2 * STEPS),
    "adaptive projected": (
        lambda: AdaptiveProjectedGuidance(
            guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5
        ),
        2 * STEPS,
    ),
    "zero star": (lambda: ClassifierFreeZeroStarGuidance(guidance_scale=3.0), 2 * STEPS),
    "skip-layer": (
        lambda: SkipLayerGuidance(
            guidance_scale=3.0,
            skip_layer_guidance_scale=2.0,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
            skip_layer_config=skipped(),
        ),
        3 * STEPS - 1,  # not in the first step
    ),
    "auto": (
        lambda: AutoGuidance(guidance_scale=3.0, dropout=1.0, auto_guidance_config=skipped()),
        2 * STEPS,
    ),
}


def wan_pipeline(guider: Any) -> ModularPipeline:
    parts = wan.build().components
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=parts["transformer"], scheduler=parts["scheduler"], guider=guider
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan22_pipeline() -> ModularPipeline:
    parts = build_wan22().components
    pipe = Wan22CoreDenoiseStep().init_pipeline()
    names = ("transformer", "transformer_2", "scheduler")
    pipe.update_components(**{name: parts[name] for name in names}, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: ModularPipeline, seed: int = 0, prompt: int = 0, steps: int = STEPS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(  # type: ignore[no-any-return]
        **wan.arguments(prompt),
        latents=torch.randn(1, 4, 2, 4, 4, generator=generator),
        num_inference_steps=steps,
        output="latents",
    )


@contextmanager
def reused_by_hand(model: nn.Module, guider: Any, computed: Collection[int]) -> Iterator[None]:
    """Within it blocks return what they stored in the same pass of the newest computed step."""

    def storing(forward: Callable[..., Any]) -> Callable[..., Any]:
        stored: dict[int, Any] = {}

        def block(*args: Any, **kwargs: Any) -> Any:
            number = guider._count_prepared
            if guider._step in computed or number not in stored:
                stored[number] = copied(forward(*args, **kwargs))
            return copied(stored[number])

        return block

    with replaced_forwards(blocks_of(model, ["blocks"]), storing):
        yield


@pytest.mark.parametrize(("guider_of", "calls"), GUIDERS.values(), ids=GUIDERS)
def test_each_pass_of_a_guider_has_a_state_of_its_own(
    guider_of: Callable[[], Any], calls: int
) -> None:
    pipe = wan_pipeline(guider_of())
    model, guider = pipe.transformer, pipe.guider
    want = run(pipe)
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps=range(STEPS))
    assert isinstance(pipe.components["transformer"], CachedModel)
    for _ in range(2):
        assert torch.equal(run(pipe), want)
    dit_cache_fx.restore(pipe)
    assert pipe.transformer is model
    dit_cache_fx.apply(pipe, "deepcache", no_cache_steps=COMPUTED)
    cached = pipe.transformer
    for seed in range(2):
        got = run(pipe, seed, prompt=seed)
        timeline = cached.cache_report().timeline
        assert len(timeline) == calls
        # a pass that is not in the first step computes when it comes first
        assert {r.step for r in timeline if r.action == "computed"} - {1} == COMPUTED
        assert sum(r.action == "reused" and r.step == 1 for r in timeline) == 2
        pipe.transformer = model
        with reused_by_hand(model, guider, COMPUTED):
            assert torch.equal(got, run(pipe, seed, prompt=seed)), seed
        pipe.transformer = cached


def test_two_experts_with_a_guider_each() -> None:
    pipe = wan22_pipeline()
    want = run(pipe, steps=12)
    dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps=range(12))
    assert torch.equal(run(pipe, steps=12), want)
    dit_cache_fx.restore(pipe)
    dit_cache_fx.apply(pipe, "taylorcache", computed_steps=5)
    for seed in range(2):
        run(pipe, seed, steps=12)
        first, second = (t.cache_report().timeline for t in (pipe.transformer, pipe.transformer_2))
        bound = len({r.step for r in first})
        steps = {r.step for r in first if r.action == "computed"}
        steps |= {bound + r.step for r in second if r.action == "computed"}
        timesteps = tuple(pipe.scheduler.timesteps.tolist())
        course = dit_cache_fx.TaylorCache(computed_steps=5).course(12, timesteps)
        assert steps == {step for step in range(12) if course.computes(step)} | {bound}


def test_flux() -> None:
    parts = flux.build().components
    pipe = FluxCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=parts["transformer"], scheduler=parts["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    named = ("prompt_embeds", "pooled_prompt_embeds")
    arguments = {name: flux.arguments()[name] for name in named}
    arguments |= {"height": 64, "width": 64, "latents": torch.randn(1, 16, 16)}

    def latents() -> Tensor:
        return pipe(**arguments, num_inference_steps=10, output="latents")  # type: ignore[no-any-return]

    want = latents()
    dit_cache_fx.apply(pipe, "taylorcache", no_cache_steps=range(10))
    assert torch.equal(latents(), want)
    dit_cache_fx.apply(dit_cache_fx.restore(pipe), "taylorcache", computed_steps=4)
    latents()
    computed = [r.step for r in pipe.transformer.cache_report().timeline if r.action == "computed"]
    assert len(computed) == 4
    assert not torch.equal(latents(), want)
    assert torch.equal(latents(), latents())


# --- which hooks there are ------------------------------------------------------------------------


def looks_on(*seen: Any) -> None:
    """A hook that changes nothing."""


def test_hooks_are_told() -> None:
    model = make(ToyDiT)
    hooks = Hooks(model)
    assert hooks.now() == Hooked()
    inner = model.blocks[1].mix
    handles = [inner.register_forward_hook(looks_on)]
    behind = hooks.now()
    handles.append(inner.register_forward_pre_hook(looks_on))
    both = hooks.now()
    assert len({Hooked(), behind, both}) == 3
    for handle in handles:
        handle.remove()
    assert hooks.now() == Hooked()


def test_a_wrapped_forward_is_told_and_one_that_was_put_back_is_none() -> None:
    model = make(ToyDiT)
    hooks, block = Hooks(model), model.blocks[1]
    own = block.forward
    with replaced_forwards([block], lambda forward: lambda *args: forward(*args)):
        assert hooks.now().wrapped
    block.forward = own  # as hooks do that were there
    assert hooks.now() == Hooked()


def perturbs(*args: Any) -> Tensor:
    """A hook that changes what a layer gives."""
    return 2 * args[-1]


@torch.no_grad()
def test_a_pass_with_a_hook_of_its_own_has_a_state_of_its_own() -> None:
    """The same call twice a step, the second time with a hook on a block."""
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
    plain, hooked = ByHand(model, ["blocks"]), ByHand(model, ["blocks"])
    hooked.model.blocks[1].register_forward_hook(perturbs)
    for computes, inputs in generation(TOY, {0, 2}, steps=4):
        assert torch.equal(cached(**inputs), plain(computes, **inputs))
        handle = model.blocks[1].register_forward_hook(perturbs)
        assert torch.equal(cached(**inputs), hooked(computes, **inputs))
        handle.remove()
    assert cached.cache_report().calls_reused == 4


@torch.no_grad()
def test_a_hook_that_is_registered_in_the_middle_and_stays_changes_nothing() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
    for step, (_, inputs) in enumerate(generation(TOY, {0, 2}, steps=4)):
        if step == 1:
            model.blocks[1].register_forward_hook(looks_on)
        cached(**inputs)
    assert actions(cached) == "CrCr"
