"""Scenarios from other projects' trackers: who calls, how often, with which batch and sampler.

`tests/scenarios/registry.py` says where each was reported and what went wrong there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning
from tests.toys import TOY, ByHand, InPlaceBlock, ToyDiT, follows, generation, make, toy_inputs

STEPS = 6


pytestmark = pytest.mark.usefixtures("no_grad")


def cache(computed: Any = (0, 2, 3), kind: type[ToyDiT] = ToyDiT, **options: Any) -> CachedModel:
    options = options or {"no_cache_steps": computed}
    return dit_cache_fx.apply(make(kind), "deepcache", **options)


def sample(step: float, rows: Sequence[int] = (0,), tokens: int = 16) -> Tensor:
    """Samples on their way from noise to pictures, one row for each seed."""
    left = 1 - step / STEPS
    noise = torch.stack([drawn(seed, tokens) for seed in rows])
    return left * noise + (1 - left) * torch.stack([drawn(1000 + seed, tokens) for seed in rows])


def drawn(seed: int, tokens: int) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def text(*prompts: int) -> Tensor:
    return torch.cat([toy_inputs(0.0, prompt=prompt)["text"] for prompt in prompts])


def inputs(step: float, prompts: Sequence[int] = (0,), **kwargs: Any) -> dict[str, Any]:
    """Keyword arguments of one call: a row for each prompt."""
    timestep = torch.full([len(prompts)], 1000 * (1 - step / STEPS))
    rows = kwargs.pop("rows", range(len(prompts)))
    return {"x": sample(step, rows, **kwargs), "timestep": timestep, "text": text(*prompts)}


def newest(cached: CachedModel, calls: int = 1) -> str:
    """What the last calls did: "C" for computed, "r" for reused."""
    timeline = cached.cache_report().timeline[-calls:]
    return "".join("C" if record.action == "computed" else "r" for record in timeline)


# --- who calls, and when --------------------------------------------------------------------------


def test_runs_behind_a_warm_up_of_one_step_are_cached_as_ever() -> None:
    """Nobody says how many steps there are: neither the warm-up nor the runs."""
    cached, fresh = (cache(schedule="balanced") for _ in range(2))
    cached(**inputs(0, prompts=[9], rows=[9]))
    for prompt in (0, 1, 2):
        by_hand = ByHand(cached._model, ["blocks"])
        for model in (cached, fresh):
            for step in range(20):
                given = inputs(step * STEPS / 20, prompts=[prompt], rows=[prompt])
                got = model(**given)
                assert torch.equal(got, by_hand(newest(model) == "C", branch=model, **given))
        assert newest(cached, 20) == newest(fresh, 20)
        assert newest(cached, 20).count("r") >= 10


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_a_call_on_a_given_picture_before_the_steps(unit: float) -> None:
    """An editing model looks at its source first: with the prompt's tensors and timestep 0.

    In the first run nothing else tells which way the timesteps go.
    """
    cached = cache()
    calls = []
    for seed in (0, 1):
        calls.append((True, inputs(STEPS, rows=[7 + seed])))
        calls += [(step in {0, 2, 3}, inputs(step, rows=[seed])) for step in range(STEPS)]
    for _, given in calls:
        given["timestep"] *= unit / 1000
    follows(cached, ByHand(cached._model, ["blocks"]), calls)


def test_contexts_that_were_entered_while_it_was_disabled() -> None:
    cached = cache()
    cached.disable()
    for step in range(STEPS):
        with cached.cache_context("cond"):
            cached(**inputs(step))
    cached.enable()
    with cached.cache_context("cond"):
        follows(cached, ByHand(cached._model, ["blocks"]), generation(TOY, {0, 2, 3}))


# --- branches and batches -------------------------------------------------------------------------


def test_three_branches_of_which_one_is_left_out_later() -> None:
    """Text, audio and neither; from the middle on the one without text is left out."""
    cached = cache(computed={0, 3})
    by_hand = ByHand(cached._model, ["blocks"])
    for step in range(STEPS):
        for prompt in (0, 1, 2) if step < 3 else (0, 2):
            given = inputs(step, prompts=[prompt], rows=[0])
            got = cached(**given)
            assert torch.equal(got, by_hand(step in {0, 3}, branch=prompt, **given)), (step, prompt)


def test_both_branches_in_one_call_or_in_two_as_memory_allows() -> None:
    """What is held from before a computed step that the form of the call missed is not used."""
    cached = cache(computed={0, 3})
    by_hand = ByHand(cached._model, ["blocks"])
    done = []
    for step, joined in enumerate([True, True, False, False, False, True, True][:STEPS]):
        for prompts in [(0, 1)] if joined else [(0,), (1,)]:
            given = inputs(step, prompts=prompts, rows=[0] * len(prompts))
            got = cached(**given)
            done.append((step, newest(cached)))
            assert torch.equal(got, by_hand(newest(cached) == "C", branch=prompts, **given)), done
    assert [action for step, action in done if step == 0] == ["C"]
    assert [action for step, action in done if step == 1] == ["r"]
    assert [action for step, action in done if step == 4] == ["r", "r"]
    for step in (2, 3, 5):  # nothing is held, scheduled, older than a scheduled step
        assert {action for at, action in done if at == step} == {"C"}


def test_a_batch_from_which_a_picture_is_dropped_in_the_middle() -> None:
    cached = cache(computed={0, 2})
    by_hand = ByHand(cached._model, ["blocks"])
    for step in range(STEPS):
        rows = (0, 1, 2) if step < 3 else (0, 2)
        given = inputs(step, prompts=rows, rows=rows)
        got = cached(**given)
        assert torch.equal(got, by_hand(step in {0, 2, 3}, branch=len(rows), **given)), step


class GuidedDiT(ToyDiT):
    """Runs its blocks for both branches and joins them itself."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, no_text: Tensor) -> Tensor:  # type: ignore[override]
        without, with_text = (
            super(GuidedDiT, self).forward(x, timestep, given) for given in (no_text, text)
        )
        return without + 4.0 * (with_text - without)


def test_guidance_inside_of_the_models_own_forward() -> None:
    cached = cache(kind=GuidedDiT)
    calls = [
        (step in {0, 2, 3}, {**inputs(step, prompts=[prompt]), "no_text": text(5)})
        for prompt in (0, 1)
        for step in range(STEPS)
    ]
    follows(cached, ByHand(cached._model, ["blocks"]), calls)


# --- samplers and samples -------------------------------------------------------------------------


def test_a_second_sampler_that_starts_lower_at_twice_the_size() -> None:
    """A run, then a few low steps on the enlarged picture, then the next run."""
    cached = cache(computed={0, 2})
    by_hand = ByHand(cached._model, ["blocks"])
    for seed in (0, 1):
        for step in range(STEPS):
            given = inputs(step, rows=[seed])
            assert torch.equal(cached(**given), by_hand(step in {0, 2}, **given)), (seed, step)
        for index, step in enumerate((3, 4, 5)):
            given = inputs(step, rows=[seed], tokens=32)
            assert torch.equal(cached(**given), by_hand(index in {0, 2}, **given)), (seed, index)


def test_inpainting_puts_the_given_picture_back_after_each_step() -> None:
    cached = cache()
    by_hand = ByHand(cached._model, ["blocks"])
    given_picture, noise, known = drawn(50, 16), drawn(51, 16), torch.arange(16)[:, None] < 10
    x = sample(0)
    for step in range(STEPS):
        given = {**inputs(step), "x": x}
        got = cached(**given)
        assert torch.equal(got, by_hand(step in {0, 2, 3}, **given)), step
        left = 1 - (step + 1) / STEPS
        x = torch.where(known, left * noise + (1 - left) * given_picture, x - got / STEPS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_timesteps_that_a_scheduler_has_cut_to_whole_numbers() -> None:
    """Karras sigmas and the cosine schedule: most of the first timesteps are one number."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True
    )
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps
    assert len(timesteps.unique()) < len(timesteps) - 3
    cached = cache(computed=range(0, 20, 4))
    by_hand = ByHand(cached._model, ["blocks"])
    for seed in (0, 1):
        for index, timestep in enumerate(timesteps):
            x = sample(STEPS * index / 20, [seed])
            given = {"x": x, "timestep": timestep.reshape(1), "text": text(0)}
            got = cached(**given)
            assert torch.equal(got, by_hand(newest(cached) == "C", **given)), index
        steps = [record.step for record in cached.cache_report().timeline[-20:]]
        assert steps == [*range(20)]


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_runs_of_four_steps(preset: str) -> None:
    """Few steps are far apart: the first and the last are computed, and what is between by hand."""
    warned = pytest.warns(DitCacheWarning, match="a cache gains nothing")  # all four are computed
    cached = cache(schedule=preset, num_steps=4)
    by_hand = ByHand(cached._model, ["blocks"])
    for seed in (0, 1):
        for step in range(4):
            given = inputs(1.5 * step, rows=[seed])
            with warned if (seed, step) == (0, 0) else nullcontext():
                got = cached(**given)
            assert torch.equal(got, by_hand(newest(cached) == "C", **given))
        done = newest(cached, 4)
        assert done[0] == done[-1] == "C"


# --- blocks ---------------------------------------------------------------------------------------


class InPlaceTwin(InPlaceBlock):
    """The same, but leaves its input as it was."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h.clone(), c)


class InPlaceBlocksDiT(ToyDiT):
    def block(self) -> InPlaceBlock:
        return InPlaceBlock()


class TwinBlocksDiT(ToyDiT):
    def block(self) -> InPlaceBlock:
        return InPlaceTwin()


def test_a_rule_on_blocks_that_overwrite_their_input() -> None:
    """The residual of the first block is what it added, not nothing."""
    done = []
    for kind in (InPlaceBlocksDiT, TwinBlocksDiT):
        cached = dit_cache_fx.apply(make(kind), "firstblockcache", threshold=1.0)
        outputs = [cached(**inputs(step / 2)) for step in range(2 * STEPS)]
        done.append((newest(cached, 2 * STEPS), outputs))
    assert set(done[0][0]) == {"C", "r"}
    assert done[0][0] == done[1][0]
    assert all(torch.equal(a, b) for a, b in zip(done[0][1], done[1][1], strict=True))
