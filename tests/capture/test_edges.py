"""What a sampler may do between two calls: prompts, resolutions, dtypes, failures, modes.

Computed steps must be the uncached model's, bit by bit; reused ones what DeepCache gives by hand.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
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
    AnyTimeDiT,
    BareUnchangedDiT,
    ByHand,
    CalledTwiceDiT,
    InPlaceCodeDiT,
    InPlaceDiT,
    InPlaceLayersDiT,
    InPlaceReadDiT,
    JoinedDiT,
    MaskedDiT,
    NestedDiT,
    NoHeadDiT,
    OptionsDiT,
    OutputsDiT,
    PerTokenDiT,
    ReferenceDiT,
    ResidualsDiT,
    ToyDiT,
    ToyOutput,
    UnchangedDiT,
    UShapeDiT,
    actions,
    blocks_of,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)
from tests.zoo import Case, case, flat
from tests.zoo.case import rows
from tests.zoo.representatives import every_case

#: those that between them have every form: two lists, masks, guards, nested inputs
SOME = tuple(
    case(name)
    for name in (
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "OfficialHunyuanVideo15Single",
    )
)
each_mode = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
two_cases = pytest.mark.parametrize("model_case", SOME[:2], ids=lambda c: c.name)
each_strategy = pytest.mark.parametrize("strategy", ["deepcache", "teacache", "taylorcache"])

#: computed steps of a generation of six
STEPS = {0, 2, 3}

Mode = Callable[[], AbstractContextManager[None]]
Calls = list[tuple[bool, dict[str, Any]]]


pytestmark = pytest.mark.usefixtures("no_grad")


@cache
def model_of(model_case: Case) -> nn.Module:
    return model_case.build()


def pair(model_case: Case, steps: set[int] = STEPS) -> tuple[CachedModel, ByHand]:
    """The cached model of a case, and the same done by hand."""
    model = model_of(model_case)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps)
    return cached, ByHand(model, model_case.block_lists)


def toy_pair(model: nn.Module, steps: set[int] = STEPS, **options: Any) -> tuple[Any, ByHand]:
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps, **options)
    return cached, ByHand(model, ["blocks"])


# --- one generation after another ----------------------------------------------------------------


@every_case
def test_two_generations_with_two_prompts(model_case: Case) -> None:
    cached, by_hand = pair(model_case)
    for prompt in (0, 1):
        follows(cached, by_hand, generation(model_case, STEPS, prompt=prompt))
        assert actions(cached) == "CrCCrr"
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (6, 6)


@two_cases
def test_blocks_run_on_computed_steps_only(model_case: Case) -> None:
    cached, _ = pair(model_case)
    with runs_of(blocks_of(model_of(model_case), model_case)) as counts:
        for _, inputs in generation(model_case, STEPS):
            cached(**inputs)
    assert counts == [3] * len(counts)


@pytest.mark.parametrize("strategy", ["teacache", "taylorcache"])
@two_cases
def test_computed_steps_are_the_uncached_models(model_case: Case, strategy: str) -> None:
    model = model_of(model_case)
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    for computes, inputs in generation(model_case, STEPS):
        same = torch.equal(flat(cached(**inputs)), flat(model(**inputs)))
        assert same == computes


@pytest.mark.parametrize(
    "name",
    [
        "HunyuanVideo15Transformer3DModel",
        "OfficialHunyuanVideo15",
        "QwenImageTransformer2DModel",
    ],
)
def test_every_mask_length_of_one_signature(name: str) -> None:
    model_case = case(name)
    cached, by_hand = pair(model_case, {0})
    for valid, valid_2 in itertools.product((8, 5, 1), (6, 4, 1)):
        calls = generation(model_case, {0}, steps=2)
        for _, inputs in calls:
            set_mask(inputs, valid, valid_2)
        follows(cached, by_hand, calls)
        assert actions(cached) == "Cr"
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (9, 9)


def set_mask(inputs: dict[str, Any], valid: int, valid_2: int) -> None:
    """Set how many tokens of the first and of the second text are valid."""
    for name, length in (
        ("encoder_attention_mask", valid),
        ("encoder_hidden_states_mask", valid),
        ("encoder_attention_mask_2", valid_2),
    ):
        if name in inputs:
            inputs[name] = (torch.arange(inputs[name].shape[1])[None] < length).long()
    if "extra_kwargs" in inputs:
        width = inputs["extra_kwargs"]["byt5_text_mask"].shape[1]
        mask = (torch.arange(width)[None] < valid_2).long()
        inputs["extra_kwargs"] = inputs["extra_kwargs"] | {"byt5_text_mask": mask}


def test_mask_length_that_changes_within_a_generation_is_never_answered_with_the_old_state() -> (
    None
):
    model_case = case("HunyuanVideo15Transformer3DModel")
    cached, _ = pair(model_case, {0})
    first, second = (dict(inputs) for _, inputs in generation(model_case, {0}, steps=2))
    set_mask(first, 8, 6)
    set_mask(second, 3, 2)
    cached(**first)
    assert torch.equal(flat(cached(**second)), flat(model_of(model_case)(**second)))
    assert cached.cache_report().calls_computed == 2


def test_in_a_cache_context_too_a_mask_of_another_length_computes() -> None:
    """There conditioning may vary, but what is held comes from so many rows."""
    model = make(MaskedDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    done = ""
    for step, length in enumerate((4, 4, 3, 2, 3, 3, 3)):
        mask = torch.arange(4)[None] < length
        inputs = toy_inputs(900.0 - 100 * step, seed=0) | {"mask": mask}
        inputs["text"] = inputs["text"] + 0.01 * step
        with cached.cache_context("cond"):
            got = cached(**inputs)
        done += actions(cached)[-1]
        assert done[-1] == "r" or torch.equal(got, model(**inputs))
    assert done == "CCCCCrr"


@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "OfficialHunyuanVideo15"])
def test_image_to_video_and_text_to_video_generations_alternate(name: str) -> None:
    model_case = case(name)
    cached, by_hand = pair(model_case)
    for prompt in (0, 2, 1):
        follows(cached, by_hand, generation(model_case, STEPS, prompt=prompt))
        assert actions(cached) == "CrCCrr"


def test_image_to_video_and_text_to_video_in_one_loop() -> None:
    model_case = case("HunyuanVideo15Transformer3DModel")
    cached, by_hand = pair(model_case)
    for calls in zip(*(generation(model_case, STEPS, prompt=p) for p in (0, 2)), strict=True):
        for branch, (computes, inputs) in enumerate(calls):
            want = flat(by_hand(computes, branch=branch, **inputs))
            assert torch.equal(flat(cached(**inputs)), want)


def test_schedule_without_step_0_starts_by_computing() -> None:
    cached, by_hand = toy_pair(make(ToyDiT), {3})
    for _ in range(2):
        follows(cached, by_hand, generation(TOY, {0, 3}))
        assert actions(cached) == "CrrCrr"


def test_schedule_longer_than_the_generation_and_shorter() -> None:
    cached, by_hand = toy_pair(make(ToyDiT), {0, 1, 40})
    for steps in (3, 8):
        follows(cached, by_hand, generation(TOY, {0, 1}, steps=steps))
        assert actions(cached) == "CC" + "r" * (steps - 2)


def test_ascending_and_descending_timesteps() -> None:
    cached, by_hand = toy_pair(make(ToyDiT))
    for _ in range(2):
        for times in ([900.0, 700.0, 500.0, 300.0, 100.0], [0.0, 200.0, 400.0, 600.0, 800.0]):
            follows(
                cached,
                by_hand,
                [(i in STEPS, toy_inputs(t, seed=i)) for i, t in enumerate(times)],
            )
            assert actions(cached) == "CrCCr"
            cached.clear_states()


def test_direction_turns_after_a_generation_without_being_told() -> None:
    cached, by_hand = toy_pair(make(ToyDiT))
    for times in ([900.0, 700.0, 500.0], [600.0, 700.0, 800.0], [700.0, 600.0, 500.0]):
        follows(cached, by_hand, [(i in STEPS, toy_inputs(t, seed=i)) for i, t in enumerate(times)])


# --- resolutions, batches, dtypes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ToyDiT"])
@pytest.mark.parametrize("change", [{"size": 1}, {"batch": 2}, {"size": 1, "batch": 3}], ids=str)
def test_two_signatures_in_one_loop(name: str, change: dict[str, int]) -> None:
    model_case = TOY if name == "ToyDiT" else case(name)
    cached, by_hand = pair(model_case)
    loops = (generation(model_case, STEPS), generation(model_case, STEPS, **change))
    for calls in zip(*loops, strict=True):
        for branch, (computes, inputs) in enumerate(calls):
            want = flat(by_hand(computes, branch=branch, **inputs))
            assert torch.equal(flat(cached(**inputs)), want)
    assert len(cached.cache_report().captures) == 2


@two_cases
def test_a_generation_at_another_resolution_and_back(model_case: Case) -> None:
    cached, by_hand = pair(model_case)
    for size in (0, 1, 0):
        follows(cached, by_hand, generation(model_case, STEPS, size=size))
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 2


def test_two_generations_of_two_resolutions_at_different_steps_in_turn() -> None:
    """A server's two requests: each stands at its own step."""
    cached, _ = pair(TOY)
    by_hand = [ByHand(model_of(TOY), ["blocks"]) for _ in range(2)]
    first, second = generation(TOY, STEPS, steps=9), generation(TOY, STEPS, size=1)
    follows(cached, by_hand[0], first[:3])
    for one, other in zip(first[3:], second, strict=True):
        follows(cached, by_hand[0], [one])
        follows(cached, by_hand[1], [other])


@two_cases
def test_half_precision(model_case: Case) -> None:
    for dtype in model_case.half[-1:]:
        model = model_case.build().to(dtype)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
        by_hand = ByHand(model, model_case.block_lists)
        follows(cached, by_hand, generation(model_case, {0, 2}, steps=4, dtype=dtype))
        assert actions(cached) == "CrCr"


@each_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_keep_the_models_dtype(strategy: str, dtype: torch.dtype) -> None:
    model = make(ToyDiT).to(dtype)
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps={0, 1, 2})
    for _, inputs in generation(TOY, set(), dtype=dtype):
        assert cached(**inputs).dtype == dtype


class _InTheSamplesDtype(ToyDiT):
    """Computes in its weights' dtype, and answers in that of the sample."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x.to(self.embed.weight.dtype), timestep, text).to(x.dtype)


def test_samples_of_two_dtypes_are_two_signatures() -> None:
    """The same values, in turn: each has a state of its own, and is answered in its dtype."""
    model = make(_InTheSamplesDtype)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    by_hand = ByHand(model, ["blocks"])
    for computes, inputs in generation(TOY, STEPS):
        for dtype in (torch.float32, torch.float64):
            given = inputs | {"x": inputs["x"].to(dtype)}
            got = cached(**given)
            assert got.dtype == dtype
            assert torch.equal(got, by_hand(computes, branch=dtype, **given))
    assert len(cached.cache_report().captures) == 2


def test_autocast_on_and_off() -> None:
    cached, by_hand = pair(TOY)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            calls = generation(TOY, STEPS)
            assert by_hand(True, **calls[0][1]).dtype == (
                torch.bfloat16 if enabled else torch.float32
            )
            follows(cached, by_hand, calls)
            assert actions(cached) == "CrCCrr"


def test_autocast_that_changes_within_a_generation() -> None:
    cached, _ = pair(TOY, {0})
    model = model_of(TOY)
    calls = [inputs for _, inputs in generation(TOY, {0})]
    cached(**calls[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cached(**calls[1]), model(**calls[1]))
        assert cached(**calls[2]).dtype == torch.bfloat16
    assert cached(**calls[3]).dtype == torch.float32


# --- autograd ------------------------------------------------------------------------------------


@two_cases
def test_works_under_no_grad_and_inference_mode_in_turn(model_case: Case) -> None:
    cached, by_hand = pair(model_case)
    modes = itertools.cycle([torch.inference_mode, torch.no_grad, torch.no_grad])
    for _ in range(2):
        for computes, inputs in generation(model_case, STEPS):
            with next(modes)():
                got = cached(**inputs)
            assert torch.equal(flat(got), flat(by_hand(computes, **inputs)))
    assert cached.cache_report().calls_reused == 6


def test_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        cached, by_hand = toy_pair(make(ToyDiT))
        follows(cached, by_hand, generation(TOY, STEPS))
        assert actions(cached) == "CrCCrr"


def test_wanted_gradients_flow_and_one_warning_says_so() -> None:
    model = make(ToyDiT)
    cached, _ = toy_pair(model)
    inputs = toy_inputs(500.0)
    with torch.enable_grad():
        with pytest.warns(DitCacheWarning, match="not cached: gradients are enabled"):
            cached(**inputs).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cached(**inputs).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.enable_grad():
        model(**inputs).sum().backward()
        model(**inputs).sum().backward()
    assert len(gradients) == len(list(model.parameters()))
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.equal(got, parameter.grad)
    assert cached.cache_report().calls_computed == 0


def test_gradients_of_an_input_alone_are_wanted_too() -> None:
    model = make(ToyDiT).requires_grad_(False)
    cached, _ = toy_pair(model)
    inputs = toy_inputs(500.0)
    with torch.enable_grad():
        x = inputs["x"].clone().requires_grad_()
        with pytest.warns(DitCacheWarning, match="gradients are enabled"):
            cached(**(inputs | {"x": x})).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_gradients_enabled_but_not_wanted_are_cached_without_a_warning() -> None:
    cached, by_hand = toy_pair(make(ToyDiT).requires_grad_(False))
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        follows(cached, by_hand, generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_nothing_held_takes_part_in_autograd() -> None:
    model = make(ToyDiT)
    cached, by_hand = toy_pair(model)
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:1])
    with torch.enable_grad(), pytest.warns(DitCacheWarning):
        assert cached(**calls[1][1]).requires_grad
    follows(cached, by_hand, calls[1:])
    assert not cached(**calls[5][1]).requires_grad


# --- failures ----------------------------------------------------------------------------------


class Interrupted(RuntimeError):
    """What a test's hook raises."""


def interrupt(*_: Any) -> None:
    raise Interrupted


@pytest.mark.parametrize("model_case", [TOY, SOME[2]], ids=lambda c: c.name)
@pytest.mark.parametrize("step", [0, 2], ids=["while capturing", "later"])
def test_a_failed_call_leaves_no_trace_in_the_next_generation(model_case: Case, step: int) -> None:
    cached, by_hand = pair(model_case)
    calls = generation(model_case, STEPS)
    follows(cached, by_hand, calls[:step])
    hook = blocks_of(model_of(model_case), model_case)[1].register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        cached(**calls[step][1])
    hook.remove()
    follows(cached, by_hand, generation(model_case, STEPS, prompt=1))
    assert actions(cached) == "CrCCrr"


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_failed_call_can_be_made_again(step: int) -> None:
    cached, by_hand = pair(TOY)
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:step])
    hook = model_of(TOY).blocks[1].register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(Interrupted):
            cached(**calls[step][1])
    hook.remove()
    follows(cached, by_hand, calls[step:])
    assert actions(cached) == "CrCCrr"


def test_a_layer_that_fails_on_a_reused_step_leaves_no_trace() -> None:
    cached, by_hand = pair(TOY)
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:4])
    hook = model_of(TOY).head.register_forward_hook(interrupt)
    with pytest.raises(Interrupted):
        cached(**calls[4][1])
    hook.remove()
    follows(cached, by_hand, calls[4:])
    assert actions(cached) == "CrCCrr"


def test_a_call_that_the_model_refuses_leaves_no_trace() -> None:
    cached, by_hand = pair(TOY)
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:2])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cached(**(calls[2][1] | {"text": torch.randn(1, TEXT, DIM + 1)}))
    follows(cached, by_hand, calls[2:])
    report = cached.cache_report()
    assert (len(report.captures), report.calls_computed) == (1, 3)


def test_wrong_arguments_raise_the_type_error_of_any_call() -> None:
    cached, _ = pair(TOY)
    inputs = toy_inputs(1.0)
    with pytest.raises(TypeError, match="text"):
        cached(inputs["x"], inputs["timestep"])
    with pytest.raises(TypeError, match="nonsense"):
        cached(**inputs, nonsense=1)


# --- the form of a call ------------------------------------------------------------------------


TIMES: dict[str, Callable[[int], Any]] = {
    "int": lambda t: t,
    "float": float,
    "0-d": lambda t: torch.tensor(float(t)),
    "0-d int": lambda t: torch.tensor(t),
    "1-d": lambda t: torch.tensor([float(t)]),
    "1-d of the batch": lambda t: torch.full([2], float(t)),
    "float64": lambda t: torch.tensor([t], dtype=torch.float64),
}


@pytest.mark.parametrize("form", TIMES)
def test_form_of_the_timestep(form: str) -> None:
    model = make(AnyTimeDiT)
    cached, by_hand = toy_pair(model)
    for _ in range(2):
        calls = [
            (i in STEPS, toy_inputs(0.0, seed=i, batch=2) | {"timestep": TIMES[form](t)})
            for i, t in enumerate([999, 800, 600, 400, 200, 0])
        ]
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 1
    assert [r.timestep for r in cached.cache_report().timeline] == [999, 800, 600, 400, 200, 0]


@pytest.mark.parametrize("still", [0, 2])
def test_timestep_for_each_token(still: int) -> None:
    """With `still` tokens that are clean all the time, as in image-to-video."""
    cached, by_hand = toy_pair(make(PerTokenDiT))
    for _ in range(2):
        calls = []
        for i, t in enumerate(TOY.timesteps(6)):
            times = torch.full([2, TOKENS], t)
            times[:, :still] = 0
            calls.append((i in STEPS, toy_inputs(0.0, seed=i, batch=2) | {"timestep": times}))
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"


def test_timestep_for_each_token_that_moves_token_by_token() -> None:
    """Tokens are finished one after the other: the first one's value stands still soon."""
    cached, by_hand = toy_pair(make(PerTokenDiT))
    times = [(torch.arange(TOKENS) * 200.0 + 400 - 200 * i).clamp(0, 1000) for i in range(6)]
    calls = [
        (i in STEPS, toy_inputs(0.0, seed=i) | {"timestep": t[None]}) for i, t in enumerate(times)
    ]
    follows(cached, by_hand, calls)
    assert actions(cached) == "CrCCrr"


def test_one_tensor_passed_as_two_arguments_is_two_inputs() -> None:
    cached, by_hand = toy_pair(make(ReferenceDiT))
    together, apart = [], []
    for computes, inputs in generation(TOY, STEPS):
        other = rows("reference", 0, (TOKENS, DIM), 1, torch.float32)
        together.append((computes, inputs | {"reference": inputs["x"]}))
        apart.append((computes, inputs | {"reference": other}))
    for calls in (together, apart, together):
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"


def test_overlapping_views_as_two_arguments() -> None:
    cached, by_hand = toy_pair(make(ReferenceDiT))
    calls = []
    for computes, inputs in generation(TOY, STEPS):
        both = rows("both", 0, (TOKENS + 2, DIM), 1, torch.float32)
        calls.append((computes, inputs | {"x": both[:, 2:], "reference": both[:, :TOKENS]}))
    follows(cached, by_hand, calls)


def test_positional_and_keyword_calls_are_the_same_calls() -> None:
    cached, by_hand = pair(TOY)
    for i, (computes, inputs) in enumerate(generation(TOY, STEPS)):
        want = by_hand(computes, **inputs)
        values = list(inputs.values())
        keywords = dict(list(inputs.items())[i % 4 :][::-1])
        assert torch.equal(cached(*values[: i % 4], **keywords), want)
    assert len(cached.cache_report().captures) == 1
    assert actions(cached) == "CrCCrr"


def test_inputs_that_are_not_contiguous_or_expanded() -> None:
    cached, by_hand = pair(TOY)
    calls: Calls = []
    for computes, inputs in generation(TOY, STEPS, batch=2):
        x = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
        one = inputs["text"][:1].expand(2, -1, -1)
        calls.append((computes, inputs | {"x": x, "text": one}))
    follows(cached, by_hand, calls)


def test_nested_containers_of_tensors_and_numbers() -> None:
    cached, by_hand = toy_pair(make(NestedDiT))
    for gain, count in ((2.0, 2), (3.0, 2), (2.0, 1)):
        calls: Calls = []
        for computes, inputs in generation(TOY, STEPS):
            text = inputs.pop("text")
            affine = (gain, torch.full([1, DIM], 0.5))
            conditions = {"texts": [text, text * 2][:count], "affine": affine, "note": None}
            calls.append((computes, inputs | {"conditions": conditions}))
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 3


OPTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda inputs: inputs,
    "no text": lambda inputs: inputs | {"text": None},
    "scale": lambda inputs: inputs | {"scale": 0.5},
    "integer scale": lambda inputs: inputs | {"scale": 2},
    "mode": lambda inputs: inputs | {"mode": "minus"},
    "flip": lambda inputs: inputs | {"flip": True},
}


def test_none_and_plain_arguments_that_change_between_calls() -> None:
    cached, by_hand = toy_pair(make(OptionsDiT))
    for option in (*OPTIONS.values(), *OPTIONS.values()):
        calls = [(computes, option(inputs)) for computes, inputs in generation(TOY, STEPS)]
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == len(OPTIONS)


def test_plain_arguments_that_change_within_a_generation_have_states_of_their_own() -> None:
    cached, by_hand = toy_pair(make(OptionsDiT))
    for computes, inputs in generation(TOY, STEPS):
        for branch, option in enumerate(OPTIONS.values()):
            given = option(inputs)
            assert torch.equal(cached(**given), by_hand(computes, branch=branch, **given))


def tensors_of(output: Any) -> Tensor:
    return output.sample if isinstance(output, ToyOutput) else flat(output)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "dataclass"])
def test_container_of_the_output(kind: str) -> None:
    model = make(OutputsDiT)
    cached, by_hand = toy_pair(model)
    for computes, inputs in generation(TOY, STEPS):
        got, want = cached(**inputs, kind=kind), by_hand(computes, **inputs, kind=kind)
        assert type(got) is type(want)
        assert torch.equal(tensors_of(got), tensors_of(want))
        if kind == "tuple":
            assert got[1:] == (None, 3)
        if kind == "dict":
            assert list(got) == ["sample", "more"]
        if kind == "dataclass":
            assert isinstance(got, ToyOutput)
            assert got.name == "toy"


@pytest.mark.parametrize(
    "name",
    ["FluxTransformer2DModel", "WanTransformer3DModel", "HunyuanVideo15Transformer3DModel"],
)
def test_return_dict_gives_the_models_output_class(name: str) -> None:
    model_case = case(name)
    cached, by_hand = pair(model_case)
    for computes, inputs in generation(model_case, STEPS, steps=3):
        given = inputs | {"return_dict": True}
        got, want = cached(**given), by_hand(computes, **given)
        assert type(got) is type(want)
        assert list(got.keys()) == list(want.keys())
        assert torch.equal(flat(got.sample), flat(want.sample))
        assert torch.equal(flat(got[0]), flat(want[0]))


# --- what the caller does with tensors ----------------------------------------------------------


def spoil(tensors: Any) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan"))


@each_mode
@pytest.mark.parametrize(
    ("strategy", "last"),
    [
        ("deepcache", None),
        ("deepcache", nn.Identity),
        ("deepcache", nn.Dropout),
        ("deepcache", nn.Flatten),
        ("teacache", nn.Identity),
        ("taylorcache", nn.Identity),
    ],
)
def test_the_caller_may_change_the_result(
    strategy: str, last: type[nn.Module] | None, mode: Mode
) -> None:
    """Where the result is the very tensor that is held, or a view of it."""
    model = make(NoHeadDiT, last=last)
    cached, other = (dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS) for _ in range(2))
    with mode():
        for computes, inputs in generation(TOY, STEPS):
            got, want = cached(**inputs), other(**inputs)
            assert torch.equal(got, want)
            if computes:
                assert torch.equal(got, model(**inputs))
            spoil([got])
        assert actions(cached) == "CrCCrr"


@each_mode
@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("deepcache", ToyDiT),
        ("deepcache", UnchangedDiT),
        ("deepcache", BareUnchangedDiT),
        ("teacache", BareUnchangedDiT),
        ("taylorcache", BareUnchangedDiT),
    ],
)
def test_the_caller_may_change_its_inputs_afterwards(
    strategy: str, kind: type[ToyDiT], mode: Mode
) -> None:
    model = make(kind)
    cached, other = (dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS) for _ in range(2))
    with mode():
        for _, inputs in generation(TOY, STEPS):
            mine = {name: tensor.clone() for name, tensor in inputs.items()}
            got, want = cached(**mine), other(**inputs)
            assert torch.equal(got, want)
            spoil(mine.values())
        assert actions(cached) == "CrCCrr"


@each_mode
def test_a_sampler_that_works_in_place_on_one_sample_tensor(mode: Mode) -> None:
    """The same tensor objects in every call, new values in them."""
    with mode():
        cached, by_hand = pair(TOY)
        buffers = toy_inputs(0.0)
        for prompt in (0, 1):
            for computes, inputs in generation(TOY, STEPS, prompt=prompt):
                for name, buffer in buffers.items():
                    buffer.copy_(inputs[name])
                assert torch.equal(cached(**buffers), by_hand(computes, **inputs))
            assert actions(cached) == "CrCCrr"


# --- what the blocks do -------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize(
    "kind",
    [
        UnchangedDiT,
        BareUnchangedDiT,
        InPlaceDiT,
        InPlaceLayersDiT,
        InPlaceCodeDiT,
        NoHeadDiT,
        JoinedDiT,
        UShapeDiT,
        CalledTwiceDiT,
        ResidualsDiT,
    ],
)
def test_deepcache_of_a_toy_is_deepcache_by_hand(kind: type[ToyDiT], mode: Mode) -> None:
    with mode():
        model = make(kind)
        cached, by_hand = toy_pair(model)
        with runs_of(model.blocks) as counts:
            for prompt in (0, 1):
                follows(cached, by_hand, generation(TOY, STEPS, prompt=prompt))
                assert actions(cached) == "CrCCrr"
        calls_of_a_block = {CalledTwiceDiT: [2, 2, 1]}.get(kind, [1] * len(counts))
        assert counts == [2 * 3 * calls for calls in calls_of_a_block]


@each_strategy
@pytest.mark.parametrize(
    "kind", [InPlaceDiT, InPlaceCodeDiT, JoinedDiT, UShapeDiT, CalledTwiceDiT, NoHeadDiT]
)
def test_computed_steps_of_a_toy_are_the_uncached_models(kind: type[ToyDiT], strategy: str) -> None:
    model = make(kind)
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS)
    for computes, inputs in generation(TOY, STEPS):
        got = cached(**inputs)
        assert torch.equal(got, model(**inputs)) == computes


@pytest.mark.parametrize("never", [{1}, {2}, {0, 2}])
@pytest.mark.parametrize(
    "kind", [ToyDiT, UnchangedDiT, InPlaceDiT, JoinedDiT, CalledTwiceDiT, ResidualsDiT]
)
def test_blocks_that_are_never_cached_see_what_the_others_gave(
    kind: type[ToyDiT], never: set[int]
) -> None:
    model = make(kind)
    ids = {"blocks": never}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, no_cache_block_id=ids)
    by_hand = ByHand(model, ["blocks"], never=[f"blocks.{i}" for i in never])
    follows(cached, by_hand, generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_reading_what_a_block_changed_in_place_is_refused() -> None:
    cached = dit_cache_fx.apply(make(InPlaceReadDiT), "deepcache", no_cache_steps={0})
    with pytest.raises(dit_cache_fx.CaptureError, match=r"'blocks.0' changes one of its inputs"):
        cached(**toy_inputs(1.0))


@each_mode
def test_an_input_that_a_block_changes_in_place_is_the_callers_own(mode: Mode) -> None:
    """The sample goes into the blocks itself: the uncached model changes it, a cached one not."""
    with mode():
        model = make(InPlaceDiT)
        model.embed = nn.Identity()
        cached, by_hand = toy_pair(model)
        for _ in range(2):
            follows(cached, by_hand, generation(TOY, STEPS))
            assert actions(cached) == "CrCCrr"


def sampled(calls: Calls, name: str) -> Calls:
    """The same calls with a sample that moves as a sampler moves it."""
    first, last = (
        calls[0][1][name],
        rows("picture", 0, calls[0][1][name].shape[1:], 1, torch.float32),
    )
    steps = len(calls)
    return [
        (computes, inputs | {name: first * (1 - i / steps) + last * (i / steps)})
        for i, (computes, inputs) in enumerate(calls)
    ]


def test_residuals_between_blocks_that_change_every_step() -> None:
    """In a cache context: from their second change on they are known to vary."""
    cached, by_hand = toy_pair(make(ResidualsDiT))
    for scale in (0, 1):
        calls: Calls = []
        for i, (computes, inputs) in enumerate(sampled(generation(TOY, STEPS), "x")):
            residuals = [
                rows(f"residual {k}", i * scale, (TOKENS, DIM), 1, torch.float32)
                for k in range(DEPTH)
            ]
            varies = scale > 0 and i == 1
            calls.append((computes or varies, inputs | {"residuals": residuals}))
        with cached.cache_context("control"):
            follows(cached, by_hand, calls)
        assert actions(cached) == ("CCCCrr" if scale else "CrCCrr")


def test_residuals_that_change_every_step_outside_of_a_context_are_computed() -> None:
    cached, _ = toy_pair(make(ResidualsDiT))

    def run() -> None:
        for i, (_, inputs) in enumerate(sampled(generation(TOY, STEPS, steps=20), "x")):
            residuals = [
                rows(f"residual {k}", i, (TOKENS, DIM), 1, torch.float32) for k in range(DEPTH)
            ]
            cached(**inputs, residuals=residuals)

    with pytest.warns(DitCacheWarning, match="residuals"):
        run()
    assert cached.cache_report().calls_reused == 0


def test_residuals_between_blocks_that_come_and_go() -> None:
    cached, by_hand = toy_pair(make(ResidualsDiT), {0})
    residuals = list(torch.ones(DEPTH, 1, TOKENS, DIM))
    given = [residuals, None, None, residuals, residuals, None]
    held: set[bool] = set()
    for (_, inputs), each in zip(generation(TOY, {0}), given, strict=True):
        branch = each is None
        computes, held = branch not in held, held | {branch}
        want = by_hand(computes, branch=branch, **inputs, residuals=each)
        assert torch.equal(cached(**inputs, residuals=each), want)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_controlnet_residuals_of_a_diffusers_model(name: str) -> None:
    model_case = case(name)
    cached, by_hand = pair(model_case)
    argument = {
        "FluxTransformer2DModel": "controlnet_block_samples",
        "SD3Transformer2DModel": "block_controlnet_hidden_states",
    }[name]
    for _ in range(2):
        calls: Calls = []
        for i, (computes, inputs) in enumerate(
            sampled(generation(model_case, STEPS), "hidden_states")
        ):
            samples = [rows(f"control {k}", i, (16, 32), 1, torch.float32) for k in range(3)]
            calls.append((computes or i == 1, inputs | {argument: samples}))
        with cached.cache_context("control"):
            follows(cached, by_hand, calls)
        assert actions(cached) == "CCCCrr"


# --- several cached models ------------------------------------------------------------------------


def test_cached_models_in_one_process_are_independent() -> None:
    models = [make(ToyDiT), make(UShapeDiT)]
    pairs = [toy_pair(model) for model in models]
    for calls in zip(*[generation(TOY, STEPS, prompt=p) for p in (0, 1)], strict=True):
        for (cached, by_hand), call in zip(pairs, calls, strict=True):
            follows(cached, by_hand, [call])
    pairs[0][0].reset_states()
    assert pairs[1][0].cache_report().calls_computed == 3
    assert pairs[1][0].cache_report().bytes_held > 0


def test_one_model_under_several_strategies_at_once() -> None:
    model = make(ToyDiT)

    def caches() -> list[CachedModel]:
        return [
            dit_cache_fx.apply(model, name, no_cache_steps=steps)
            for name, steps in (("deepcache", {0}), ("teacache", {0, 2}), ("taylorcache", {0, 1}))
        ]

    together = caches()
    results = [[cached(**inputs) for cached in together] for _, inputs in generation(TOY, STEPS)]
    for place, alone in enumerate(caches()):
        for index, (_, inputs) in enumerate(generation(TOY, STEPS)):
            assert torch.equal(alone(**inputs), results[index][place])
    assert [c.cache_report().calls_computed for c in together] == [1, 2, 2]


def test_applying_to_a_cached_model_caches_the_model_behind_it() -> None:
    model = make(ToyDiT)
    first = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    second = dit_cache_fx.apply(first, "deepcache", no_cache_steps={0, 1})
    with runs_of(model.blocks) as counts:
        for _, inputs in generation(TOY, STEPS):
            second(**inputs)
    assert counts == [2] * DEPTH
    assert first.cache_report().calls_computed == 0


def test_results_are_tensors_of_the_callers_mode() -> None:
    cached, _ = pair(TOY)
    calls = [inputs for _, inputs in generation(TOY, STEPS)]
    plain: Tensor = cached(**calls[0])
    with torch.inference_mode():
        inference = cached(**calls[1])
    assert not plain.is_inference()
    assert inference.is_inference()
    plain.add_(1)
