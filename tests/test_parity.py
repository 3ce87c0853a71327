"""Cached models against the reference implementations, over all models and strategies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, interval_schedule
from tests.reference import (
    STREAMS,
    DeepCacheReference,
    Reference,
    TaylorReference,
    TeaCacheReference,
    argument,
    dynamic_steps,
    moving_inputs,
    split,
)
from tests.zoo import CASES, Case, case, flat
from tests.zoo.representatives import each_case, each_kind, marks_of

STEPS = 50
PUBLISHED = interval_schedule(STEPS, 11, 45, 4)
#: a skip when only step 0 is held, then ones with derivatives up to order 3, at distances 1 and 2
SHORT = 10
IN_SHORT = frozenset({0, 2, 3, 4, 7})
CLOSE = 1e-5

Outputs = list[Tensor]


pytestmark = pytest.mark.usefixtures("no_grad")


# --- the loops ---------------------------------------------------------------------------------


@cache
def model_of(model_case: Case) -> nn.Module:
    return model_case.build()


@cache
def uncached(model_case: Case, steps: int, **inputs: Any) -> Outputs:
    model = model_of(model_case)
    return [flat(model(**moving_inputs(model_case, i, steps, **inputs))) for i in range(steps)]


def cached_outputs(model_case: Case, cached: CachedModel, steps: int, **inputs: Any) -> Outputs:
    """A generation of the cached model, which has to tell its steps by itself."""
    return [flat(cached(**moving_inputs(model_case, i, steps, **inputs))) for i in range(steps)]


def reference_outputs(model_case: Case, reference: Reference, steps: int, **inputs: Any) -> Outputs:
    return [flat(reference(i, moving_inputs(model_case, i, steps, **inputs))) for i in range(steps)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def assert_computed_steps_are_the_models_own(
    got: Outputs, exact: Outputs, computed: Collection[int]
) -> None:
    assert [i for i in computed if i < len(got) and not torch.equal(got[i], exact[i])] == []


def assert_reused_steps_differ_from_the_model(
    reference: Outputs, exact: Outputs, computed: Collection[int]
) -> None:
    """Else the comparison with the reference would show nothing."""
    reused = [i for i in range(len(exact)) if i not in computed]
    assert reused
    assert all(relative_error(reference[i], exact[i]) > 10 * CLOSE for i in reused)


def assert_parity(
    model_case: Case,
    cached: CachedModel,
    reference: Reference,
    steps: int,
    largest_error: float,
    **inputs: Any,
) -> None:
    """Every step is the reference's, and every computed step the model's."""
    exact = uncached(model_case, steps, **inputs)
    want = reference_outputs(model_case, reference, steps, **inputs)
    got = cached_outputs(model_case, cached, steps, **inputs)
    assert_computed_steps_are_the_models_own(got, exact, reference.computed)
    assert_reused_steps_differ_from_the_model(want, exact, reference.computed)
    if largest_error:
        errors = {i: relative_error(got[i], want[i]) for i in range(steps)}
        assert {i: e for i, e in errors.items() if not e < largest_error} == {}
    else:
        assert [i for i in range(steps) if not torch.equal(got[i], want[i])] == []


# --- DeepCache -----------------------------------------------------------------------------------


def places(model_case: Case) -> list[tuple[str, int]]:
    """The first, a middle and the last block of each list of the model."""
    sizes = {n: len(model_of(model_case).get_submodule(n)) for n in model_case.block_lists}
    return [(n, i) for n, size in sizes.items() for i in sorted({0, size // 2, size - 1})]


#: of these DeepCache is tried at every place by default
EVERY_PLACE = ("FluxTransformer2DModel", "OfficialHunyuanVideo15")


def _marks(
    model_case: Case, name: str, index: int, everywhere: Collection[str]
) -> tuple[pytest.MarkDecorator, ...]:
    size = len(model_of(model_case).get_submodule(name))
    return marks_of(model_case.name, model_case.name in everywhere or index == size // 2)


def _each_place(everywhere: Collection[str]) -> pytest.MarkDecorator:
    """Every place of the models; of those that are not `everywhere` the middle by default."""
    return pytest.mark.parametrize(
        ("model_case", "ids"),
        [
            pytest.param(
                c,
                {name: {index}},
                id=f"{c.name}-{name}.{index}",
                marks=_marks(c, name, index, everywhere),
            )
            for c in CASES
            for name, index in places(c)
        ],
    )


each_place = _each_place(EVERY_PLACE)
each_middle = _each_place(())
each_last_place = pytest.mark.parametrize(
    ("model_case", "ids"),
    [
        pytest.param(c, {name: {index}}, id=f"{c.name}-{name}.{index}", marks=marks_of(c.name))
        for c in CASES
        for name, index in dict(places(c)).items()
    ],
)


def aliased(model_case: Case, ids: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """The same ids under the names of the published helpers."""
    alias = dict(zip(model_case.block_lists, ("double_blocks", "single_blocks"), strict=False))
    return {alias[name]: blocks for name, blocks in ids.items()}


@each_kind
def test_deepcache_over_the_published_schedule(model_case: Case) -> None:
    model = model_of(model_case)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=PUBLISHED)
    reference = DeepCacheReference(model, model_case.block_lists, PUBLISHED)
    assert_parity(model_case, cached, reference, STEPS, largest_error=0)


@each_place
def test_deepcache_with_a_block_that_is_never_cached(
    model_case: Case, ids: dict[str, set[int]]
) -> None:
    model = model_of(model_case)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=IN_SHORT, no_cache_block_id=ids)
    reference = DeepCacheReference(model, model_case.block_lists, IN_SHORT, ids)
    assert_parity(model_case, cached, reference, SHORT, largest_error=0)


@each_last_place
def test_deepcache_with_a_block_that_is_never_cached_by_its_alias(
    model_case: Case, ids: dict[str, set[int]]
) -> None:
    model = model_of(model_case)
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, no_cache_block_id=aliased(model_case, ids)
    )
    reference = DeepCacheReference(model, model_case.block_lists, {0}, ids)
    assert_parity(model_case, cached, reference, 3, largest_error=0)


def test_deepcache_with_the_published_block_over_the_published_schedule() -> None:
    """As users of HunyuanVideo-1.5 set it: the last double block always runs."""
    model_case = case("OfficialHunyuanVideo15")
    model = model_of(model_case)
    last = len(model.double_blocks) - 1
    ids = {"double_blocks": {last}}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=PUBLISHED, no_cache_block_id=ids)
    reference = DeepCacheReference(model, model_case.block_lists, PUBLISHED, ids)
    assert_parity(model_case, cached, reference, STEPS, largest_error=0)


@each_case
def test_a_model_without_cached_blocks_is_the_model(model_case: Case) -> None:
    model = model_of(model_case)
    everything = {n: range(len(model.get_submodule(n))) for n in model_case.block_lists}
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, no_cache_block_id=everything
    )
    got = [flat(cached(**moving_inputs(model_case, i, STEPS))) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(got, uncached(model_case, STEPS), strict=False))


# --- TaylorCache ---------------------------------------------------------------------------------

ORDERS = [
    {"max_order": 1, "low_freqs_order": 1, "high_freqs_order": 1},
    {"max_order": 3, "low_freqs_order": 3, "high_freqs_order": 3},
    {"max_order": 2, "low_freqs_order": 2, "high_freqs_order": 0},
    {"max_order": 2, "low_freqs_order": 1, "high_freqs_order": 3},
]


def taylor_pair(
    model_case: Case, computed: Collection[int], orders: Mapping[str, int]
) -> tuple[CachedModel, TaylorReference]:
    model = model_of(model_case)
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=computed, **orders)
    return cached, TaylorReference(model, model_case.block_lists, computed, **orders)


@each_kind
def test_taylorcache_over_the_published_schedule(model_case: Case) -> None:
    cached, reference = taylor_pair(model_case, PUBLISHED, {})
    assert_parity(model_case, cached, reference, STEPS, CLOSE)


@pytest.mark.parametrize(
    ("model_case", "orders"),
    [
        pytest.param(
            c,
            orders,
            id=f"{'-'.join(map(str, orders.values()))}-{c.name}",
            marks=marks_of(c.name, place in (number % 4, (number + 2) % 4)),
        )
        for number, c in enumerate(CASES)
        for place, orders in enumerate(ORDERS)
    ],
)
def test_taylorcache_of_all_orders_and_bands(model_case: Case, orders: dict[str, int]) -> None:
    cached, reference = taylor_pair(model_case, IN_SHORT, orders)
    assert_parity(model_case, cached, reference, SHORT, CLOSE)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_taylorcache_orders_are_limited_by_the_maximum(name: str) -> None:
    orders = {"max_order": 1, "low_freqs_order": 2, "high_freqs_order": 3}
    cached, reference = taylor_pair(case(name), IN_SHORT, orders)
    assert reference.orders == (1, 1)
    assert_parity(case(name), cached, reference, SHORT, CLOSE)


@each_case
def test_taylorcache_of_order_0_is_deepcache(model_case: Case) -> None:
    model = model_of(model_case)
    order_0 = {"max_order": 0, "low_freqs_order": 0, "high_freqs_order": 0}
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=IN_SHORT, **order_0)
    reference = DeepCacheReference(model, model_case.block_lists, IN_SHORT)
    assert_parity(model_case, cached, reference, SHORT, largest_error=0)


@each_case
def test_taylorcache_with_blocks_that_are_never_cached(model_case: Case) -> None:
    """Several runs are extrapolated, each from its own past."""
    model, lists = model_of(model_case), model_case.block_lists
    ids = {lists[0]: {1}} if len(lists) == 1 else {lists[0]: {1}, lists[1]: {0}}
    cached = dit_cache_fx.apply(
        model, "taylorcache", no_cache_steps=IN_SHORT, no_cache_block_id=ids
    )
    reference = TaylorReference(model, lists, IN_SHORT, ids)
    assert len(reference.runs) == len(lists) + 1
    assert_parity(model_case, cached, reference, SHORT, CLOSE)


def test_the_references_bands_sum_to_the_whole() -> None:
    x = torch.randn(2, 33, 5)
    low, high = split(x)
    assert low.norm() > 0.1
    assert high.norm() > 0.1
    torch.testing.assert_close(low + high, x)


# --- TeaCache ------------------------------------------------------------------------------------


def tea_reference(
    model_case: Case, computed: Collection[int], ids: Mapping[str, set[int]] | None = None
) -> TeaCacheReference:
    streams = STREAMS[model_case.name]
    model = model_of(model_case)
    return TeaCacheReference(streams, model, model_case.block_lists, computed, ids)


@each_kind
def test_teacache_over_the_published_schedule(model_case: Case) -> None:
    cached = dit_cache_fx.apply(model_of(model_case), "teacache", no_cache_steps=PUBLISHED)
    reference = tea_reference(model_case, PUBLISHED)
    assert_parity(model_case, cached, reference, STEPS, CLOSE)


@each_middle
def test_teacache_with_a_block_that_is_never_cached(
    model_case: Case, ids: dict[str, set[int]]
) -> None:
    cached = dit_cache_fx.apply(
        model_of(model_case), "teacache", no_cache_steps=IN_SHORT, no_cache_block_id=ids
    )
    reference = tea_reference(model_case, IN_SHORT, ids)
    assert_parity(model_case, cached, reference, SHORT, CLOSE)


def flux_inputs_with_as_much_text_as_image(model_case: Case, step: int) -> dict[str, Any]:
    inputs = moving_inputs(model_case, step, SHORT)
    tokens = inputs["hidden_states"].shape[1]
    text = inputs["encoder_hidden_states"]
    repeats = tokens // text.shape[1]
    assert repeats > 1
    inputs["encoder_hidden_states"] = text.repeat(1, repeats, 1) + torch.arange(tokens)[:, None]
    inputs["txt_ids"] = inputs["txt_ids"].repeat(repeats, 1)
    return inputs


def test_teacache_does_not_take_text_of_the_images_shape_for_the_image() -> None:
    """The text leaves the first run as it is stored: the image's residual is not its own."""
    model_case = case("FluxTransformer2DModel")
    ids = {"transformer_blocks": {2}}
    cached = dit_cache_fx.apply(
        model_of(model_case), "teacache", no_cache_steps={0, 1, 2, 5}, no_cache_block_id=ids
    )
    reference = tea_reference(model_case, {0, 1, 2, 5}, ids)
    errors = []
    for step in range(SHORT):
        inputs = flux_inputs_with_as_much_text_as_image(model_case, step)
        errors.append(relative_error(flat(cached(**inputs)), flat(reference(step, inputs))))
    assert max(errors) < CLOSE


# --- all three, called in other ways -------------------------------------------------------------

LOW_AND_HIGH = {"low_freqs_order": 1, "high_freqs_order": 2}
FEW = 6
IN_FEW = frozenset({0, 1, 3})


def pairs(
    model_case: Case, lists: Sequence[str], **options: Any
) -> Iterator[tuple[CachedModel, Reference, float]]:
    """Each strategy's cached model with its reference and the largest error."""
    model, streams = model_of(model_case), STREAMS[model_case.name]
    options["no_cache_steps"] = IN_FEW
    deep = dit_cache_fx.apply(model, "deepcache", **options)
    yield deep, DeepCacheReference(model, lists, IN_FEW), 0
    tea = dit_cache_fx.apply(model, "teacache", **options)
    yield tea, TeaCacheReference(streams, model, lists, IN_FEW), CLOSE
    taylor = dit_cache_fx.apply(model, "taylorcache", **options, **LOW_AND_HIGH)
    yield taylor, TaylorReference(model, lists, IN_FEW, **LOW_AND_HIGH), CLOSE


@each_case
def test_a_batch_at_another_resolution(model_case: Case) -> None:
    for cached, reference, error in pairs(model_case, model_case.block_lists):
        assert_parity(model_case, cached, reference, FEW, error, batch=2, size=1, prompt=1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(c.name, marks=marks_of(c.name)) for c in CASES if "HunyuanVideo15" in c.name],
)
def test_a_model_that_takes_another_way_with_an_image(name: str) -> None:
    """From prompt 2 on there is an image: one branch of the model's own control flow or another."""
    for cached, reference, error in pairs(case(name), case(name).block_lists):
        assert_parity(case(name), cached, reference, FEW, error, prompt=2)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        pytest.param(
            c.name,
            chosen,
            marks=marks_of(c.name, usual=chosen == 0),
        )
        for c in CASES
        if len(c.block_lists) == 2
        for chosen in (0, 1)
    ],
)
def test_only_one_of_two_lists_is_cached(name: str, chosen: int) -> None:
    blocks = case(name).block_lists[chosen]
    for cached, reference, error in pairs(case(name), [blocks], blocks=blocks):
        assert_parity(case(name), cached, reference, FEW, error)


# --- TeaCache's own rule -------------------------------------------------------------------------

Signal = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def block_input(model_case: Case) -> Signal:
    """What the first block is given as the tracked stream."""
    name = model_case.block_lists[0]
    wanted = STREAMS[model_case.name][name].argument

    def signal(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        block = model.get_submodule(name)[0]
        seen = []
        hook = block.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(argument(m.forward, wanted, args, kwargs)),
            with_kwargs=True,
        )
        model(**inputs)
        hook.remove()
        return seen[0]

    return signal


def norm_output(path: str) -> Signal:
    """The first thing that an adaptive norm returns: the modulated stream."""

    def signal(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        seen = []
        hook = model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[-1]))
        model(**inputs)
        hook.remove()
        return seen[0][0]

    return signal


def attention_input(path: str, name: str | None = None) -> Signal:
    """What the first attention (or projection) is given: the norm's output, scaled and shifted."""

    def signal(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        seen = []
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(argument(m.forward, name, args, kwargs)),
            with_kwargs=True,
        )
        model(**inputs)
        hook.remove()
        return seen[0]

    return signal


def wan_modulated(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """`norm1(x) * (1 + scale) + shift`, from the block's own table and the time projection."""
    block = model.blocks[0]
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        for name in ("hidden_states", "temb"):
            seen[name] = argument(module.forward, name, args, kwargs)

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs)
    hook.remove()
    shift, scale = (block.scale_shift_table + seen["temb"]).chunk(6, dim=1)[:2]
    return block.norm1(seen["hidden_states"]) * (1 + scale) + shift


MODULATED: dict[str, Signal] = {
    "FluxTransformer2DModel": norm_output("transformer_blocks.0.norm1"),
    "SD3Transformer2DModel": norm_output("transformer_blocks.0.norm1"),
    "DiTTransformer2DModel": norm_output("transformer_blocks.0.norm1"),
    "PixArtTransformer2DModel": attention_input("transformer_blocks.0.attn1", "hidden_states"),
    "QwenImageTransformer2DModel": attention_input("transformer_blocks.0.attn", "hidden_states"),
    "HunyuanVideoTransformer3DModel": norm_output("transformer_blocks.0.norm1"),
    "HunyuanVideo15Transformer3DModel": norm_output("transformer_blocks.0.norm1"),
    "WanTransformer3DModel": wan_modulated,
    "CogVideoXTransformer3DModel": norm_output("transformer_blocks.0.norm1"),
    "LTXVideoTransformer3DModel": attention_input("transformer_blocks.0.attn1", "hidden_states"),
    "ZImageTransformer2DModel": attention_input("layers.0.attention", "hidden_states"),
    "OfficialHunyuanVideo15": attention_input("double_blocks.0.img.projections", "x"),
    "OfficialHunyuanVideo15Single": attention_input("double_blocks.0.img.projections", "x"),
}

#: enough steps for several computed ones; the first coefficient is that of the highest power
RULE_STEPS = 16
QUADRATIC = (3.0, 0.5, 0.01)


def signals_of(model_case: Case, signal: Signal) -> list[Tensor]:
    model = model_case.build()
    return [signal(model, moving_inputs(model_case, i, RULE_STEPS)) for i in range(RULE_STEPS)]


def threshold_for(signals: Sequence[Tensor], every: float) -> float:
    """The sum of the signal's changes that is reached about every `every` steps."""
    changes = [
        ((new - old).abs().mean() / old.abs().mean()).item() for old, new in pairwise(signals)
    ]
    return every * sum(changes) / len(changes)


def computed_by(model_case: Case, **options: Any) -> list[int]:
    """The steps that a cached model computes by the dynamic rule; their outputs are checked."""
    cached = dit_cache_fx.apply(model_of(model_case), "teacache", **options)
    got = cached_outputs(model_case, cached, RULE_STEPS)
    timeline = cached.cache_report().timeline
    assert [record.step for record in timeline] == list(range(RULE_STEPS))
    computed = [record.step for record in timeline if record.action == "computed"]
    reference = tea_reference(model_case, computed)
    want = reference_outputs(model_case, reference, RULE_STEPS)
    exact = uncached(model_case, RULE_STEPS)
    assert_computed_steps_are_the_models_own(got, exact, computed)
    assert max(map(relative_error, got, want)) < CLOSE
    return computed


def assert_rule_is_followed(model_case: Case, name: str, signal: Signal) -> None:
    signals = signals_of(model_case, signal)
    threshold = threshold_for(signals, every=2.6)
    expected = dynamic_steps(signals, threshold)
    assert 3 < len(expected) < RULE_STEPS - 3
    assert computed_by(model_case, rel_l1_thresh=threshold, signal=name) == expected


@each_case
def test_rule_on_the_first_blocks_input(model_case: Case) -> None:
    assert_rule_is_followed(model_case, "input", block_input(model_case))


@each_case
def test_rule_on_the_first_blocks_modulated_input(model_case: Case) -> None:
    assert_rule_is_followed(model_case, "modulated", MODULATED[model_case.name])


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_the_two_signals_are_told_apart(name: str) -> None:
    """With one threshold for both: so the tests above could fail."""
    model_case = case(name)
    signals = [signals_of(model_case, s) for s in (block_input(model_case), MODULATED[name])]
    threshold = threshold_for(signals[0], every=3.3)
    expected = [dynamic_steps(each, threshold) for each in signals]
    assert expected[0] != expected[1]
    for signal, steps in zip(("input", "modulated"), expected, strict=True):
        assert computed_by(model_case, rel_l1_thresh=threshold, signal=signal) == steps


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_rule_with_coefficients_and_forced_steps(name: str) -> None:
    model_case = case(name)
    signals = signals_of(model_case, block_input(model_case))
    change = threshold_for(signals, every=1)
    threshold = 3.4 * sum(c * change**p for p, c in zip((2, 1, 0), QUADRATIC, strict=True))
    free = dynamic_steps(signals, threshold, QUADRATIC)
    forced = {next(i for i in range(2, RULE_STEPS) if i not in free), RULE_STEPS - 1}
    expected = dynamic_steps(signals, threshold, QUADRATIC, forced)
    options = {"rel_l1_thresh": threshold, "coefficients": QUADRATIC, "signal": "input"}
    assert dynamic_steps(signals, threshold) != free != expected
    assert computed_by(model_case, **options) == free
    assert computed_by(model_case, **options, no_cache_steps=forced) == expected


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "OfficialHunyuanVideo15"])
def test_rule_of_a_second_generation_starts_anew(name: str) -> None:
    model_case = case(name)
    signals = signals_of(model_case, block_input(model_case))
    threshold = threshold_for(signals, every=3.3)
    cached = dit_cache_fx.apply(
        model_of(model_case), "teacache", rel_l1_thresh=threshold, signal="input"
    )
    for _ in range(2):
        cached_outputs(model_case, cached, RULE_STEPS)
        timeline = cached.cache_report().timeline
        computed = [record.step for record in timeline if record.action == "computed"]
        assert computed == dynamic_steps(signals, threshold)


class BareBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) * (1 + temb))


class BareModel(nn.Module):
    """Its first block is given the caller's own tensor: there is no embedding before it."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.blocks = nn.ModuleList([BareBlock(), BareBlock()])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        temb = self.time(timestep[:, None, None])
        for block in self.blocks:
            x = block(x, temb)
        return x


@pytest.mark.parametrize("in_place", [False, True], ids=["new-tensors", "in-place"])
def test_rule_when_the_sampler_changes_the_sample_in_place(in_place: bool) -> None:
    start, move = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    samples = [start + 0.1 * i * move for i in range(RULE_STEPS)]
    threshold = threshold_for(samples, every=2.45)
    cached = dit_cache_fx.apply(
        BareModel().eval(), "teacache", rel_l1_thresh=threshold, signal="input"
    )
    buffer = torch.empty_like(start)
    for i, sample in enumerate(samples):
        cached(buffer.copy_(sample) if in_place else sample, torch.tensor([1 - i / RULE_STEPS]))
    timeline = cached.cache_report().timeline
    computed = [record.step for record in timeline if record.action == "computed"]
    assert computed == dynamic_steps(samples, threshold)
