"""What a capture must see in a model's own code: values that are read, randomness, hidden state.

A value that is read out of a tensor is a guard: another value leads to another capture. A model
whose forward depends on more than its tensors and arguments is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, CaptureError, DitCacheError
from tests.toys import (
    DEPTH,
    DIM,
    TEXT,
    TOY,
    Block,
    ByHand,
    CountingDiT,
    DecidesOnBlockDiT,
    MaskedDiT,
    RandomDiT,
    ReadingDiT,
    ReadsTimeDiT,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)
from tests.zoo import CASES, Case, case, flat
from tests.zoo.case import rows
from tests.zoo.representatives import marks_of

STEPS = {0, 2, 3}


pytestmark = pytest.mark.usefixtures("no_grad")


def pair(kind: Callable[..., nn.Module], **options: Any) -> tuple[CachedModel, ByHand]:
    model = make(kind, **options)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    return cached, ByHand(model, ["blocks"])


def test_only_graphs_that_run_get_code(generated: list[fx.Graph]) -> None:
    """Passes build a graph each: their code would take a third of the first call."""
    cached = dit_cache_fx.apply(make(ToyDiT), "taylorcache", no_cache_steps=STEPS)
    for _, inputs in generation(TOY, STEPS):
        cached(**inputs)
    assert actions(cached) == "CrCCrr"
    assert len(generated) <= 3  # the captured graph, a computed step, a reused step


def prompts(text: Tensor) -> list[tuple[bool, dict[str, Any]]]:
    """A generation with this text, the same object in every call."""
    return [(computes, inputs | {"text": text}) for computes, inputs in generation(TOY, STEPS)]


# --- what a capture costs --------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_case",
    [
        pytest.param(c, id=c.name, marks=marks_of(c.name))
        for c in CASES
        if c.name != "ZImageTransformer2DModel"
    ],
)
def test_the_first_call_runs_every_block_once(model_case: Case) -> None:
    model = model_case.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    trunk = [b for name in model_case.block_lists for b in model.get_submodule(name)]
    with runs_of(trunk) as counts:
        cached(**model_case.inputs(model_case.timesteps(2)[0]))
    assert counts == [1] * len(trunk)


def test_a_capture_leaves_the_random_state_and_the_grad_mode_alone() -> None:
    cached, _ = pair(ToyDiT)
    before = torch.get_rng_state()
    with torch.inference_mode():
        cached(**toy_inputs(1.0))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_grad_enabled()


def test_a_capture_holds_no_block_results_after_the_call() -> None:
    """What is held is the report's bytes, nothing else: seen from what stays alive."""
    model = make(ToyDiT, depth=4)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    results: list[Any] = []

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        results.append(torch.multiprocessing.reductions.StorageWeakRef(output.untyped_storage()))

    for block in model.blocks:
        block.register_forward_hook(note)
    cached(**toy_inputs(1.0))
    assert len(results) == 4
    assert [result.expired() for result in results[:3]] == [True] * 3


# --- guards ------------------------------------------------------------------------------------


def branch_on_bool(text: Tensor) -> float:
    return 2.0 if torch.all(text == 0) else 1.0


def branch_on_comparison(text: Tensor) -> float:
    return 2.0 if text.sum() == 0 else 1.0


def branch_on_item(text: Tensor) -> float:
    return 2.0 if text.abs().max().item() == 0 else 1.0


def scale_by_item(text: Tensor) -> float:
    return 1.0 + float(text.abs().max() > 0)


def scale_by_int(text: Tensor) -> float:
    return 1.0 + int((text == 0).sum())


def read_tolist(text: Tensor) -> float:
    return 1.0 + sum((text[0, :, 0] == 0).tolist())


def read_numpy(text: Tensor) -> float:
    return 1.0 + (text[0, :, 0] == 0).numpy().sum().item()


def ask_equal(text: Tensor) -> float:
    return 2.0 if torch.equal(text, torch.zeros_like(text)) else 1.0


def ask_allclose(text: Tensor) -> float:
    return 2.0 if torch.allclose(text, torch.zeros_like(text)) else 1.0


def count_nonzero(text: Tensor) -> float:
    return 1.0 + len(text.nonzero())


def count_unique(text: Tensor) -> float:
    return 1.0 + len(torch.unique(text))


def loop_over_rows(text: Tensor) -> float:
    return 1.0 + sum(bool(row.any()) for row in text[0])


QUESTIONS = (
    branch_on_bool,
    branch_on_comparison,
    branch_on_item,
    scale_by_item,
    scale_by_int,
    read_tolist,
    read_numpy,
    ask_equal,
    ask_allclose,
    count_nonzero,
    count_unique,
    loop_over_rows,
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_value_that_is_read_becomes_a_guard(question: Callable[[Tensor], float]) -> None:
    cached, by_hand = pair(ReadingDiT, question=question)
    some, nothing = rows("text", 0, (TEXT, DIM), 1, torch.float32), torch.zeros(1, TEXT, DIM)
    assert question(some) != question(nothing)
    for text in (some, nothing, some, nothing):
        follows(cached, by_hand, prompts(text.clone()))
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 2


@pytest.mark.parametrize("question", [q for q in QUESTIONS if q is not branch_on_item])
def test_another_tensor_of_the_same_answer_needs_no_other_capture(
    question: Callable[[Tensor], float],
) -> None:
    cached, by_hand = pair(ReadingDiT, question=question)
    for prompt in range(3):
        text = rows("text", prompt, (TEXT, DIM), 1, torch.float32)
        follows(cached, by_hand, prompts(text))
    assert len(cached.cache_report().captures) == 1


def test_a_guard_sees_a_tensor_that_was_changed_in_place() -> None:
    cached, by_hand = pair(ReadingDiT, question=branch_on_bool)
    text = rows("text", 0, (TEXT, DIM), 1, torch.float32)
    follows(cached, by_hand, prompts(text))
    text.zero_()
    follows(cached, by_hand, prompts(text))
    assert len(cached.cache_report().captures) == 2


def test_a_guard_sees_an_inference_tensor_that_was_changed_in_place() -> None:
    with torch.inference_mode():
        cached, by_hand = pair(ReadingDiT, question=branch_on_bool)
        text = rows("text", 0, (TEXT, DIM), 1, torch.float32)
        follows(cached, by_hand, prompts(text))
        text.zero_()
        follows(cached, by_hand, prompts(text))
        assert len(cached.cache_report().captures) == 2


def test_branches_on_both_sides_of_a_guard_have_states_of_their_own() -> None:
    cached, by_hand = pair(ReadingDiT, question=branch_on_bool)
    texts = (rows("text", 0, (TEXT, DIM), 1, torch.float32), torch.zeros(1, TEXT, DIM))
    for computes, inputs in generation(TOY, STEPS):
        for branch, text in enumerate(texts):
            given = inputs | {"text": text}
            want = by_hand(computes, branch=branch, **given)
            assert torch.equal(cached(**given), want)


class _LateDiT(ToyDiT):
    """Goes through its blocks the other way round from the middle of a generation on."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c, h = self.condition(timestep, text), self.embed(x)
        for block in reversed(self.blocks) if (timestep < 500).all() else self.blocks:
            h = block(h, c)
        return self.head(h)


def test_another_answer_within_a_generation_begins_with_nothing_held() -> None:
    """What one side of a guard has left is no state of the other one."""
    model = make(_LateDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    for timestep, computes in ((900.0, True), (700.0, False), (400.0, True), (200.0, False)):
        inputs = toy_inputs(timestep)
        got = cached(**inputs)
        assert not computes or torch.equal(got, model(**inputs))
    assert actions(cached) == "CrCr"


def test_a_value_that_changes_with_the_prompt_never_runs_out_of_captures() -> None:
    """Such as the number of valid tokens, read with `.item()`: a server sees many of them."""
    cached, by_hand = pair(ReadingDiT, question=scale_by_int)
    for count in (*range(14), 0, 7):
        text = torch.ones(1, TEXT, DIM)
        text.flatten()[:count] = 0
        follows(cached, by_hand, prompts(text))
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) <= 14


def test_every_length_of_a_mask() -> None:
    cached, by_hand = pair(MaskedDiT)
    for valid in (*range(1, 12), 3):
        text = rows("long text", 0, (12, DIM), 1, torch.float32)
        mask = torch.arange(12)[None] < valid
        calls = [(computes, inputs | {"mask": mask}) for computes, inputs in prompts(text)]
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (36, 36)


def test_every_place_of_a_mask_of_one_length() -> None:
    cached, by_hand = pair(MaskedDiT)
    for place in range(4):
        text = rows("long text", 0, (4, DIM), 1, torch.float32)
        mask = (torch.arange(4)[None] == place).long()
        calls = [(computes, inputs | {"mask": mask}) for computes, inputs in prompts(text)]
        follows(cached, by_hand, calls)
    assert len(cached.cache_report().captures) == 1


def test_a_shape_that_depends_on_data_is_used_as_a_number() -> None:
    """The number of valid tokens goes into the arithmetic."""

    def valid(text: Tensor) -> float:
        return float(text[text > 0].shape[0])

    cached, by_hand = pair(ReadingDiT, question=valid)
    for count in range(1, 6):
        text = torch.zeros(1, TEXT, DIM)
        text.flatten()[:count] = 1
        follows(cached, by_hand, prompts(text))
        assert actions(cached) == "CrCCrr"


class _AttendingDiT(ToyDiT):
    """The layers behind the blocks attend to the selected text: its length is a number there."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        text = self.text_in(torch.stack([t[m] for t, m in zip(text, mask, strict=True)]))
        h = self.trunk(self.embed(x), self.time(timestep))
        return self.head(h + torch.softmax(h @ text.transpose(1, 2), dim=-1) @ text)


def test_a_length_that_the_graph_has_as_a_number() -> None:
    """Then each length has a capture."""
    cached, by_hand = pair(_AttendingDiT)
    for valid in (3, 2, 4, 3, 2):
        text = rows("text", valid, (TEXT, DIM), 2, torch.float32)
        mask = (torch.arange(TEXT)[None] < valid).expand(2, TEXT)
        calls = [
            (c, inputs | {"text": text, "mask": mask})
            for c, inputs in generation(TOY, STEPS, batch=2)
        ]
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 3


class _LargeDiT(ToyDiT):
    """Decides on the selected text, with its length as a number."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        chosen = text[mask]
        large = (chosen.view(chosen.shape[0], 2, DIM // 2) > 100).any()
        return super().forward(x, timestep, text) * (2.0 if large else 1.0)


def test_a_length_that_a_guard_has_as_a_number() -> None:
    cached, by_hand = pair(_LargeDiT)
    for valid in (3, 2, 3):
        mask = torch.arange(TEXT)[None] < valid
        calls = [(c, inputs | {"mask": mask}) for c, inputs in generation(TOY, STEPS)]
        follows(cached, by_hand, calls)
        assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 2


def test_a_value_that_changes_every_step_is_refused_at_last() -> None:
    model = make(ReadsTimeDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    calls = [inputs for _, inputs in generation(TOY, STEPS, steps=9)]
    for inputs in calls[:8]:
        assert torch.equal(cached(**inputs), model(**inputs))
    with pytest.raises(
        CaptureError,
        match=r"8 captures of the same inputs have guards with different values: .*"
        r"reads a value that changes from step to step, such as the timestep's",
    ):
        cached(**calls[8])
    cached.disable()
    assert torch.equal(cached(**calls[8]), model(**calls[8]))


def test_a_decision_on_a_blocks_result_is_refused() -> None:
    cached, _ = pair(DecidesOnBlockDiT)
    with pytest.raises(
        CaptureError, match=r"control flow depends on the result of a cached block \(blocks\.\d\)"
    ):
        cached(**toy_inputs(1.0))


@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "OfficialHunyuanVideo15"])
def test_prompts_of_one_kind_share_a_capture(name: str) -> None:
    model_case = case(name)
    model = model_case.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    for prompt, captures in ((0, 1), (1, 1), (2, 2), (3, 2), (0, 2)):
        inputs = model_case.inputs(1000.0, prompt=prompt)
        assert torch.equal(flat(cached(**inputs)), flat(model(**inputs)))
        assert len(cached.cache_report().captures) <= captures


# --- randomness and hidden state -------------------------------------------------------------


def test_randomness_outside_of_blocks_is_refused_with_the_first_difference() -> None:
    cached, _ = pair(RandomDiT)
    with pytest.raises(
        CaptureError,
        match=r"the captured graph disagrees with the model: input of block blocks\.0, tensor 0: "
        r"-?\d+\.\d+ instead of -?\d+\.\d+ at \(0, 0, 0\)(.|\n)*pass check=False",
    ):
        cached(**toy_inputs(1.0))
    assert cached.cache_report().captures == ()


def test_randomness_passes_with_check_false() -> None:
    model = make(RandomDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, check=False)
    for computes, inputs in generation(TOY, STEPS):
        torch.manual_seed(1)
        got = cached(**inputs)
        assert got.isfinite().all()
        if computes and inputs["timestep"] < 1000:  # the first one runs twice
            torch.manual_seed(1)
            assert torch.equal(got, model(**inputs))
    assert actions(cached) == "CrCCrr"


def test_randomness_inside_a_block_needs_no_leave() -> None:
    class NoisyBlock(Block):
        def forward(self, h: Tensor, c: Tensor) -> Tensor:
            return super().forward(h, c) + 0.1 * torch.randn_like(h)

    class NoisyDiT(ToyDiT):
        def block(self) -> nn.Module:
            return NoisyBlock()

    model = make(NoisyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    for computes, inputs in generation(TOY, STEPS):
        torch.manual_seed(3)
        got = cached(**inputs)
        torch.manual_seed(3)
        assert torch.equal(got, model(**inputs)) == computes


def test_hidden_state_of_the_model_is_refused() -> None:
    cached, _ = pair(CountingDiT)
    with pytest.raises(CaptureError, match=r"sets attribute 'seen'\[0\] of the model and reads it"):
        cached(**toy_inputs(1.0))


def test_hidden_state_passes_with_check_false_as_it_was_captured() -> None:
    cached = dit_cache_fx.apply(make(CountingDiT), "deepcache", no_cache_steps=STEPS, check=False)
    results = [cached(**toy_inputs(1000.0 - i)) for i in range(6)]
    assert all(result.isfinite().all() for result in results)
    assert actions(cached) == "CrCCrr"


def test_a_number_that_hides_in_a_counter_attribute_is_refused() -> None:
    """A plain attribute that forward itself changes: every capture would be old at once."""

    class Attribute(ToyDiT):
        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            self.gain += 0.5
            return super().trunk(h, c)

    cached, _ = pair(Attribute)
    with pytest.raises(CaptureError, match="sets attribute 'gain' of the model and reads it"):
        cached(**toy_inputs(1.0))


def test_a_layer_that_is_random_around_the_blocks_is_refused() -> None:
    class Noise(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h + torch.randn_like(h)

    class NoisyHead(ToyDiT):
        def last(self) -> nn.Module:
            return Noise()

    cached, _ = pair(NoisyHead)
    with pytest.raises(CaptureError, match=r"check=False"):
        cached(**toy_inputs(1.0))


def test_every_refusal_is_a_dit_cache_error_and_leaves_the_original_usable() -> None:
    for kind in (RandomDiT, CountingDiT, DecidesOnBlockDiT):
        model = make(kind)
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
        for _ in range(2):
            with pytest.raises(DitCacheError):
                cached(**toy_inputs(1.0))
        assert {name: set(vars(m)) for name, m in model.named_modules()} == before
        assert nn.Module.__call__.__module__ == "torch.nn.modules.module"
        cached.disable()
        assert cached(**toy_inputs(1.0)).isfinite().all()


# --- what a capture must not bake in --------------------------------------------------------------


def test_random_numbers_that_are_drawn_from_a_generator_argument_are_refused() -> None:
    """A generator is an object of the call: its state is no input of the graph."""

    class Generated(ToyDiT):
        def forward(  # type: ignore[override]
            self, x: Tensor, timestep: Tensor, text: Tensor, generator: torch.Generator
        ) -> Any:
            noise = torch.randn(x.shape, generator=generator)
            return super().forward(x + noise, timestep, text)

    cached, _ = pair(Generated)
    with pytest.raises(CaptureError, match="disagrees with the model"):
        cached(**toy_inputs(1.0), generator=torch.Generator().manual_seed(0))


def test_constants_made_in_forward_are_of_the_calls_own_device_and_dtype() -> None:
    class Constants(ToyDiT):
        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            ramp = torch.linspace(0, 1, h.shape[1], dtype=h.dtype)[None, :, None]
            table = torch.tensor([[1.0, 2.0]] * (h.shape[2] // 2)).flatten().to(h.dtype)
            return super().trunk(h * table + ramp + torch.arange(DIM), c)

    cached, by_hand = pair(Constants)
    for size in (0, 1):
        follows(cached, by_hand, generation(TOY, STEPS, size=size))


def test_a_cache_of_the_model_that_the_first_call_fills() -> None:
    """Rotary tables are often made once and kept in an attribute, by their size."""

    class Tables(ToyDiT):
        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[int, Tensor] = {}

        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            size = h.shape[1]
            if size not in self.tables:
                self.tables[size] = torch.linspace(0, 1, size)[None, :, None]
            return super().trunk(h + self.tables[size], c)

    cached, by_hand = pair(Tables)
    for size in (0, 1, 0):
        follows(cached, by_hand, generation(TOY, STEPS, size=size))
        assert actions(cached) == "CrCCrr"


def test_captures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    cached, _ = pair(ToyDiT)
    with caplog.at_level(logging.INFO, logger="dit_cache_fx"):
        cached(**toy_inputs(1.0))
    assert "captured graph 1 for x[1, 6, 8]" in caplog.text
    assert f"block lists blocks ({DEPTH})" in caplog.text


def through_tensor(t: Any) -> Tensor:
    return torch.tensor([t], dtype=torch.float32)


def through_as_tensor(t: Any) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float32).reshape(1)


def through_full(t: Any) -> Tensor:
    return torch.full([1], t, dtype=torch.float32)


def through_arithmetic(t: Any) -> Tensor:
    return torch.ones(1) * t


def through_division_first(t: Any) -> Tensor:
    return torch.ones(1) * (t / 1000) * 1000


@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize(
    "use",
    [
        through_tensor,
        through_as_tensor,
        through_full,
        through_arithmetic,
        through_division_first,
    ],
)
def test_a_timestep_that_is_a_number_in_the_models_code(
    use: Callable[[Any], Tensor], number: type
) -> None:
    """The number is no constant of the graph: one capture serves every step."""

    class Number(ToyDiT):
        def forward(self, x: Tensor, timestep: Any, text: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, use(timestep), text)

    cached, by_hand = pair(Number)
    for step, (computes, inputs) in enumerate(generation(TOY, STEPS)):
        given = inputs | {"timestep": number(950 - 100 * step)}
        assert torch.equal(cached(**given), by_hand(computes, **given))
    assert len(cached.cache_report().captures) == 1


def test_a_call_without_any_tensor() -> None:
    class Nothing(ToyDiT):
        def forward(self, timestep: float) -> Any:  # type: ignore[override]
            time = through_as_tensor(timestep)
            return super().forward(torch.ones(1, 4, DIM), time, torch.ones(1, 2, DIM))

    model = make(Nothing)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, blocks="blocks")
    for index in range(6):
        same = torch.equal(cached(1000.0 - index), model(1000.0 - index))
        assert same == (index in STEPS)
