"""Which branch, which step and which generation a call belongs to.

Nobody tells the cached model: it knows by the timestep, by the order of the calls in a step and by
the conditioning tensors, or by `cache_context`. However the calls are mixed, each branch must be
answered as by a cached model that sees only this branch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning
from tests.toys import (
    DEPTH,
    DIM,
    TEXT,
    TOKENS,
    TOY,
    ByHand,
    ContextDiT,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)
from tests.zoo import Case, case, flat
from tests.zoo.case import rows
from tests.zoo.representatives import KINDS, marks_of

#: those that between them have every form: two lists, masks, guards, lists and dicts of tensors
SOME = tuple(
    case(name)
    for name in (
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
        "QwenImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "OfficialHunyuanVideo15",
        "OfficialHunyuanVideo15Single",
        "ZImageTransformer2DModel",
    )
)
some_cases = pytest.mark.parametrize(
    "model_case", [pytest.param(c, id=c.name, marks=marks_of(c.name, among=KINDS)) for c in SOME]
)
each_mode = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])

#: computed steps of a generation of six
STEPS = {0, 2, 3}

Mode = Callable[[], AbstractContextManager[None]]
Calls = list[tuple[bool, dict[str, Any]]]


pytestmark = pytest.mark.usefixtures("no_grad")


@cache
def model_of(model_case: Case) -> nn.Module:
    return model_case.build()


def cache_of(model_case: Case, steps: set[int] = STEPS) -> CachedModel:
    return dit_cache_fx.apply(model_of(model_case), "deepcache", no_cache_steps=steps)


def text_of(name: str, tokens: int = TEXT) -> Tensor:
    return rows(name, 0, (tokens, DIM), 1, torch.float32)


def kept_text(calls: Calls) -> Calls:
    """The same calls, every one with the very same text tensor, as pipelines do."""
    text = calls[0][1]["text"]
    return [(computes, inputs | {"text": text}) for computes, inputs in calls]


# --- the branches of a step ---------------------------------------------------------------------


def guided(model_case: Case, prompts: tuple[int, ...], steps: int = 6) -> list[list[Any]]:
    """For each step the inputs of each branch; a branch's conditioning is new in every call."""
    return [
        [model_case.inputs(t, seed=index, prompt=p) for p in prompts]
        for index, t in enumerate(model_case.timesteps(steps))
    ]


@some_cases
def test_interleaved_branches_have_states_of_their_own(model_case: Case) -> None:
    cached = cache_of(model_case)
    by_hand = ByHand(model_of(model_case), model_case.block_lists)
    for index, calls in enumerate(guided(model_case, (0, 1))):
        for branch, inputs in enumerate(calls):
            want = by_hand(index in STEPS, branch=branch, **inputs)
            assert torch.equal(flat(cached(**inputs)), flat(want))
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (6, 6)
    assert (report.steps_computed, report.steps_reused) == (3, 3)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideo15Transformer3DModel"])
def test_branches_by_cache_context_equal_models_that_saw_one_branch(name: str) -> None:
    model_case = case(name)
    cached = cache_of(model_case)
    alone = {branch: cache_of(model_case) for branch in ("cond", "uncond")}
    for calls in guided(model_case, (0, 2)):
        for (branch, single), inputs in zip(alone.items(), calls, strict=True):
            with cached.cache_context(branch):
                got = flat(cached(**inputs))
            assert torch.equal(got, flat(single(**inputs)))
    assert cached.cache_report().calls_reused == 6


def test_branches_are_told_apart_in_the_timeline() -> None:
    cached = cache_of(TOY)
    for calls in guided(TOY, (0, 1, 2), steps=2):
        for inputs in calls:
            cached(**inputs)
    timeline = cached.cache_report().timeline
    assert [(r.step, r.branch) for r in timeline] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)
    ]  # fmt: skip


@each_mode
@pytest.mark.parametrize("uncond_tokens", [TEXT, TEXT + 3])
@pytest.mark.parametrize("uncond_first", [False, True])
def test_branches_of_the_same_and_of_another_text_length(
    uncond_tokens: int, uncond_first: bool, mode: Mode
) -> None:
    with mode():
        model = make(ToyDiT)
        cached, *alone = (
            dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS) for _ in range(3)
        )
        texts = [text_of("cond"), text_of("uncond", uncond_tokens)]
        order = (1, 0) if uncond_first else (0, 1)
        for _ in range(2):
            for index, t in enumerate(TOY.timesteps(6)):
                for branch in order:
                    inputs = toy_inputs(t, seed=index) | {"text": texts[branch]}
                    assert torch.equal(cached(**inputs), alone[branch](**inputs))
        report = cached.cache_report()
        assert (report.calls_computed, report.calls_reused) == (12, 12)


@each_mode
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("uncond_first", [False, True])
@pytest.mark.parametrize("uncond_tokens", [TEXT, TEXT + 3])
@pytest.mark.parametrize("guided_steps", [{2, 3, 4, 5, 6, 7}, {0, 2, 4, 6}, {0, 1, 2, 5}], ids=str)
def test_guidance_that_starts_late_skips_steps_or_stops(
    guided_steps: set[int], uncond_tokens: int, uncond_first: bool, mode: Mode, named: bool
) -> None:
    """The schedule counts steps of the generation, not calls of a branch."""
    computed = {0, 3, 6}
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=computed)
        by_hand = ByHand(model, ["blocks"])
        texts = [text_of("cond"), text_of("uncond", uncond_tokens)]
        seen: dict[int, int] = {}
        for index, t in enumerate(TOY.timesteps(8)):
            branches = [0, 1] if index in guided_steps else [0]
            for branch in reversed(branches) if uncond_first else branches:
                inputs = toy_inputs(t, seed=index) | {"text": texts[branch]}
                # a branch that missed a computed step has nothing that may be used
                since = range(seen.get(branch, -1) + 1, index + 1)
                computes = not computed.isdisjoint(since)
                seen[branch] = index
                want = by_hand(computes, branch=branch, **inputs)
                name = ("cond", "uncond")[branch]
                with cached.cache_context(name) if named else nullcontext():
                    got = cached(**inputs)
                assert torch.equal(got, want), f"step {index}, branch {branch}"


@each_mode
def test_branches_change_places_between_steps_and_keep_their_state(mode: Mode) -> None:
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
        by_hand = ByHand(model, ["blocks"])
        texts = [text_of(f"swap {branch}") for branch in range(3)]
        orders = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)]
        for index, (t, order) in enumerate(zip(TOY.timesteps(6), orders, strict=True)):
            for branch in order:
                inputs = toy_inputs(t, seed=index) | {"text": texts[branch]}
                want = by_hand(index in STEPS, branch=branch, **inputs)
                assert torch.equal(cached(**inputs), want)


def test_conditioning_tensors_made_anew_in_every_call_are_told_by_their_order() -> None:
    cached = cache_of(TOY)
    by_hand = ByHand(model_of(TOY), ["blocks"])
    for index, calls in enumerate(guided(TOY, (0, 1, 2, 3))):
        for branch, inputs in enumerate(calls):
            want = by_hand(index in STEPS, branch=branch, **inputs)
            assert torch.equal(cached(**inputs), want)


@pytest.mark.parametrize("named", [False, True])
def test_a_second_evaluation_of_a_timestep_is_the_next_step(named: bool) -> None:
    """Second-order samplers call twice at one timestep, but at the first."""
    cached = cache_of(TOY)
    by_hand = ByHand(model_of(TOY), ["blocks"])
    text, times = text_of("heun"), [t for t in TOY.timesteps(4) for _ in range(2)][1:]
    with cached.cache_context("cond") if named else nullcontext():
        for index, t in enumerate(times):
            inputs = toy_inputs(t, seed=index) | {"text": text}
            assert torch.equal(cached(**inputs), by_hand(index in STEPS, **inputs)), index
    assert [r.step for r in cached.cache_report().timeline] == [*range(7)]


@each_mode
@pytest.mark.parametrize("name", [None, "cond"])
@pytest.mark.parametrize("warm_ups", [1, 2, 9])
def test_one_step_warm_up_does_not_leak_into_a_generation_with_the_same_prompt(
    mode: Mode, name: str | None, warm_ups: int
) -> None:
    """Nothing tells which of the first calls the second step goes on from: it is computed."""
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 3})
        by_hand, text = ByHand(model, ["blocks"]), text_of("kept")
        times = TOY.timesteps(6)
        with cached.cache_context(name) if name else nullcontext():
            for seed in range(warm_ups):
                cached(**(toy_inputs(times[0], seed=50 + seed) | {"text": text}))
            for index, t in enumerate(times):
                inputs = toy_inputs(t, seed=index) | {"text": text}
                want = by_hand(index in {0, 1, 3}, **inputs)
                assert torch.equal(cached(**inputs), want), f"step {index}"


def test_a_generation_that_shares_a_part_of_the_conditioning_starts_with_nothing() -> None:
    """It goes on downwards (a refiner pass), with the same text but another pooled text."""
    sd3 = case("SD3Transformer2DModel")
    model = sd3.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    with torch.no_grad(), runs_of(model.transformer_blocks) as counts:
        kept = {
            name: sd3.inputs(0.0)[name] for name in ("encoder_hidden_states", "pooled_projections")
        }
        for index, t in enumerate(sd3.timesteps(6)):
            if index == 3:
                kept["pooled_projections"] = sd3.inputs(0.0)["pooled_projections"] + 1
            cached(**(sd3.inputs(t, seed=index) | kept))
    assert counts == [2, 2, 2]
    assert actions(cached) == "CrrCrr"


# --- cache_context -----------------------------------------------------------------------------


def test_cache_context_wins_over_order_and_conditioning() -> None:
    """One prompt, samples that tell nothing, and names that change places: state goes by these."""
    cached = cache_of(TOY, {0})
    by_hand = ByHand(model_of(TOY), ["blocks"])
    orders = [("a", "b"), ("b", "a"), ("b", "a")]
    for index, (t, order) in enumerate(zip(TOY.timesteps(3), orders, strict=True)):
        for name in order:
            inputs = toy_inputs(t, seed=10 * index + (name == "b"))
            with cached.cache_context(name):
                got = cached(**inputs)
            assert torch.equal(got, by_hand(index == 0, branch=name, **inputs))


def test_cache_context_ends_when_left_also_by_an_exception_and_nests() -> None:
    cached = cache_of(TOY, {0})
    by_hand = ByHand(model_of(TOY), ["blocks"])
    first, second = (inputs for _, inputs in generation(TOY, {0}, steps=2))

    def call(name: Any, inputs: dict[str, Any], computes: bool) -> None:
        assert torch.equal(cached(**inputs), by_hand(computes, branch=name, **inputs))

    call(None, first, True)
    with cached.cache_context("outer"):
        call("outer", first | {"text": text_of("outer")}, True)
        with suppress(ZeroDivisionError), cached.cache_context("inner"):
            call("inner", first | {"text": text_of("inner")}, True)
            raise ZeroDivisionError
        call("outer", second | {"text": text_of("outer")}, False)
    call(None, second, False)


def test_cache_context_enters_the_models_own_one() -> None:
    model = make(ContextDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    with cached.cache_context("cond"):
        assert model.contexts == ["cond"]
        cached(**toy_inputs(1.0))
    assert model.contexts == []
    assert cached.cache_report().calls_computed == 1


# --- one generation after another ---------------------------------------------------------------


def test_one_step_generations_a_thousand_times() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    held = set()
    for number in range(1000):
        inputs = toy_inputs(1000.0, seed=number % 7, prompt=number % 3)
        assert torch.equal(cached(**inputs), model(**inputs))
        if number % 50 == 0:
            held.add(cached.cache_report().bytes_held)
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (1000, 0)
    assert len(report.captures) == 1
    assert max(held) <= 8 * TOKENS * DIM * 4
    assert len(report.timeline) <= 4096


@each_mode
def test_one_step_warm_up_does_not_leak_into_a_generation_with_another_prompt(mode: Mode) -> None:
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
        warm_up = toy_inputs(1000.0, seed=9, prompt=1)
        cached(**warm_up)
        follows(cached, ByHand(model, ["blocks"]), kept_text(generation(TOY, STEPS)))


@each_mode
def test_one_step_guided_warm_up_does_not_leak_into_a_guided_generation(mode: Mode) -> None:
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
        for name in ("old cond", "old uncond"):
            cached(**(toy_inputs(1000.0, seed=9) | {"text": text_of(name)}))
        by_hand = ByHand(model, ["blocks"])
        texts = [text_of("cond"), text_of("uncond")]
        for index, t in enumerate(TOY.timesteps(6)):
            for branch, text in enumerate(texts):
                inputs = toy_inputs(t, seed=index) | {"text": text}
                want = by_hand(index in STEPS, branch=branch, **inputs)
                assert torch.equal(cached(**inputs), want)


def test_a_warm_up_at_a_lower_timestep_is_forgotten_by_clear_states() -> None:
    """Nothing tells it from the first step of the same generation: it has to be said."""
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    cached(**toy_inputs(1.0, seed=9, prompt=1))
    cached.clear_states()
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))


def test_a_generation_that_was_broken_off_is_not_continued_by_the_next() -> None:
    model = make(ToyDiT)
    cached, by_hand = (
        dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS),
        ByHand(model, ["blocks"]),
    )
    for steps in (2, 5, 1, 3):
        follows(cached, by_hand, generation(TOY, STEPS)[:steps])
        assert actions(cached).endswith("CrCCrr"[:steps])


@each_mode
def test_a_new_prompt_that_goes_on_downwards_starts_with_nothing(mode: Mode) -> None:
    """The second generation (a refiner pass) starts below where the first one ended."""
    with mode():
        model = make(ToyDiT)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
        calls = kept_text(generation(TOY, {0}, steps=8))
        follows(cached, ByHand(model, ["blocks"]), calls[:4])
        text = text_of("refined")
        rest = [(i == 0, inputs | {"text": text}) for i, (_, inputs) in enumerate(calls[4:])]
        follows(cached, ByHand(model, ["blocks"]), rest)


def two_timesteps(step: int, text: Tensor) -> dict[str, Any]:
    """Two rows with timesteps of their own, given once where they are equal: at the first step."""
    times = torch.tensor([1000.0 - step, 1000.0 - 2 * step]).unique()
    return toy_inputs(0.0, seed=step, batch=2) | {"timestep": times, "text": text}


def test_a_signature_that_changes_after_the_first_step_is_the_same_generation() -> None:
    """The timesteps are one tensor of one, then of two: the text tells that it goes on."""
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 3})
    text = torch.cat([text_of("first"), text_of("second")])
    for _ in range(2):
        for step in range(5):
            inputs = two_timesteps(step, text)
            got = cached(**inputs)
            # nothing is held of the new signature yet at step 1
            assert torch.equal(got, model(**inputs)) == (step in (0, 1, 3))
        assert [r.step for r in cached.cache_report().timeline] == list(range(5))


def test_another_prompt_of_another_size_after_one_step_is_another_generation() -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0, 3})
    for step, name in ((0, "first"), (1, "second")):
        cached(**(two_timesteps(step, torch.cat(2 * [text_of(name)]))))
        assert [r.step for r in cached.cache_report().timeline] == [0]


# --- what is held is bounded ---------------------------------------------------------------------


def test_more_branches_than_are_held_are_computed_with_one_warning() -> None:
    """Those that are held stay so: the ninth computes, not all of them."""
    model = make(ToyDiT, depth=1)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    texts = [text_of(f"prompt {i}") for i in range(9)]
    calls = [i | {"text": text} for _, i in generation(TOY, {0}, steps=4) for text in texts]
    by_hand = ByHand(model, ["blocks"])
    with pytest.warns(DitCacheWarning, match="a step calls more than 8 branches") as caught:
        outputs = [cached(**inputs) for inputs in calls]
    assert len(caught) == 1
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (9 + 3, 3 * 8)
    for number, (record, output, inputs) in enumerate(
        zip(report.timeline, outputs, calls, strict=True)
    ):
        computes = record.action == "computed"
        assert torch.equal(output, by_hand(computes, branch=number % 9, **inputs))


def test_many_resolutions_hold_a_bounded_number_of_states_and_graphs() -> None:
    """A signature whose graph was dropped is captured again."""
    model = make(ToyDiT, depth=1)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    by_hand = ByHand(model, ["blocks"])
    sizes = [*range(1, 35), 1]
    for tokens in sizes:
        calls: Calls = []
        for computes, inputs in generation(TOY, {0}, steps=2):
            x = rows("x", tokens, (tokens, DIM), 1, torch.float32)
            calls.append((computes, inputs | {"x": x}))
        follows(cached, by_hand, calls)
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (len(sizes), len(sizes))
    assert len(report.captures) <= 32
    assert report.bytes_held <= 8 * max(sizes) * DIM * 4


def test_many_cache_contexts_hold_a_bounded_number_of_states() -> None:
    cached = cache_of(TOY)
    inputs = toy_inputs(1000.0)
    for number in range(40):
        with cached.cache_context(f"branch {number}"):
            cached(**inputs)
    report = cached.cache_report()
    assert report.bytes_held <= 8 * TOKENS * DIM * 4
    assert len(report.captures) == 1


def test_the_next_generation_replaces_what_the_last_one_held() -> None:
    cached = cache_of(TOY)
    sizes = set()
    for prompt in range(4):
        for _, inputs in generation(TOY, STEPS, prompt=prompt):
            cached(**inputs)
            sizes.add(cached.cache_report().bytes_held)
    assert sizes == {TOKENS * DIM * 4}


def test_blocks_run_once_for_each_branch_and_computed_step() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    with runs_of(model.blocks) as counts:
        for calls in guided(TOY, (0, 1)):
            for inputs in calls:
                cached(**inputs)
    assert counts == [2 * len(STEPS)] * DEPTH


def test_the_tensors_of_a_generation_before_once_more() -> None:
    """What its last call was given is no sign of its branch, which holds nothing any more."""
    made = []
    for i in range(6):
        inputs = toy_inputs(900.0 - 100 * i)
        made.append(inputs | {"x": inputs["x"] * (1 + i / 10), "text": inputs["text"].clone()})
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0, 3})
    for _ in range(2):
        for inputs in made:
            cached(**inputs)
        assert actions(cached) == "CrrCrr"
