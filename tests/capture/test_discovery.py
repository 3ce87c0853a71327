"""Block lists and the timestep argument are found from the captured call, or named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, DiscoveryError, OptionError
from tests.toys import (
    DEPTH,
    TOY,
    Block,
    ByHand,
    LayerListDiT,
    NestedBlocksDiT,
    PairsDiT,
    PlainLayersDiT,
    SampleRefinerDiT,
    SequentialDiT,
    TauDiT,
    TextRefinerDiT,
    ToyDiT,
    TwoTausDiT,
    UnusedListDiT,
    actions,
    blocks_of,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)
from tests.zoo import Case, case
from tests.zoo.representatives import each_kind

STEPS = {0, 2, 3}


pytestmark = pytest.mark.usefixtures("no_grad")


def found_in(model: nn.Module, inputs: dict[str, Any], **options: Any) -> dict[str, int]:
    """The block lists that the first call finds."""
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0}, **options)
    cached(**inputs)
    return cached.cache_report().blocks


# --- the models of the zoo -------------------------------------------------------------------


@each_kind
def test_blocks_and_timestep_of_every_zoo_model(model_case: Case) -> None:
    model = model_case.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    times = model_case.timesteps(3)
    for t in times:
        cached(**model_case.inputs(t))
    report = cached.cache_report()
    sizes = {name: len(model.get_submodule(name)) for name in model_case.block_lists}
    assert report.blocks == sizes
    assert list(report.blocks) == list(model_case.block_lists)
    assert report.cached_blocks == {name: tuple(range(n)) for name, n in sizes.items()}
    assert [r.timestep for r in report.timeline] == pytest.approx(times)
    assert [r.step for r in report.timeline] == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_are_found_at_every_size(size: int, batch: int) -> None:
    flux = case("FluxTransformer2DModel")
    blocks = found_in(flux.build(), flux.inputs(1.0, size=size, batch=batch))
    assert list(blocks) == list(flux.block_lists)


# --- lists that are no trunk -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [ToyDiT, TextRefinerDiT, SampleRefinerDiT, LayerListDiT, UnusedListDiT]
)
def test_only_the_trunk_is_taken(kind: type[ToyDiT]) -> None:
    model = make(kind)
    assert found_in(model, toy_inputs(1.0)) == {"blocks": DEPTH}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_a_refiner_that_only_feeds_the_trunk_is_skipped_with_it() -> None:
    model = make(TextRefinerDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    (_, first), *calls = generation(TOY, STEPS)
    cached(**first)
    with runs_of(model.refiner) as counts:
        for _, inputs in calls:
            cached(**inputs)
    assert counts == [2, 2]


def test_members_that_are_lists_stand_for_themselves() -> None:
    model = make(PairsDiT)
    names = [f"blocks.{i}" for i in range(DEPTH)]
    assert found_in(model, toy_inputs(1.0)) == dict.fromkeys(names, 2)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, names), generation(TOY, STEPS))
    assert actions(cached) == "CrCCrr"


def test_a_list_inside_another_module_has_its_path_as_its_name() -> None:
    model = make(NestedBlocksDiT)
    assert found_in(model, toy_inputs(1.0)) == {"trunk_module.layers": DEPTH}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, ["trunk_module.layers"]), generation(TOY, STEPS))


def test_lists_are_in_the_order_of_their_calls() -> None:
    class Reversed(ToyDiT):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.blocks
            del self.blocks
            self.first = nn.ModuleList([Block(), Block()])

        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            for block in (*self.first, *self.second):
                h = block(h, c)
            return h

    model = make(Reversed)
    assert list(found_in(model, toy_inputs(1.0)).items()) == [("first", 2), ("second", DEPTH)]
    ids = {"double_blocks": {0}, "single_blocks": {1}}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0}, no_cache_block_id=ids)
    cached(**toy_inputs(1.0))
    assert cached.cache_report().cached_blocks == {"first": (1,), "second": (0, 2)}


def test_no_trunk_lists_the_candidates_with_what_is_wrong() -> None:
    model = make(PlainLayersDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    with pytest.raises(DiscoveryError) as caught:
        cached(**toy_inputs(1.0))
    text = str(caught.value)
    assert "no block list found. Name it: blocks=['...']" in text
    assert "layers (3): its members are single layers" in text
    assert "text_layers (2): does not depend on 'x'" in text
    assert "spare (2): never called" in text


def test_a_failed_search_is_made_again_on_the_next_call() -> None:
    cached = dit_cache_fx.apply(make(PlainLayersDiT), "deepcache", no_cache_steps={0})
    for _ in range(2):
        with pytest.raises(DiscoveryError, match="no block list found"):
            cached(**toy_inputs(1.0))
    assert cached.cache_report().captures == ()


# --- blocks that are named -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "names"),
    [
        (lambda _: "transformer_blocks", ["transformer_blocks"]),
        (lambda m: m.single_transformer_blocks, ["single_transformer_blocks"]),
        (
            lambda m: ["transformer_blocks", m.single_transformer_blocks],
            ["transformer_blocks", "single_transformer_blocks"],
        ),
        (
            lambda m: (m.single_transformer_blocks, "transformer_blocks"),
            ["transformer_blocks", "single_transformer_blocks"],
        ),
    ],
    ids=["by name", "by module", "both", "both in another order"],
)
def test_named_blocks(choose: Callable[[Any], Any], names: list[str]) -> None:
    flux = case("FluxTransformer2DModel")
    model = flux.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, blocks=choose(model))
    by_hand = ByHand(model, names)
    calls = generation(flux, STEPS)
    with runs_of(blocks_of(model, flux)) as counts:
        follows(cached, by_hand, calls[:4])
        before = list(counts)
        follows(cached, by_hand, calls[4:])
    assert list(cached.cache_report().blocks) == names
    # two reused steps: blocks that are not cached run, unless they only feed cached ones
    runs = [after - count for after, count in zip(counts, before, strict=True)]
    assert runs == ([0] * 3 + [2] * 3 if names == ["transformer_blocks"] else [0] * 6)


def test_named_blocks_may_be_what_the_search_does_not_take() -> None:
    model = make(SampleRefinerDiT)
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps=STEPS, blocks=["refiner", "blocks"]
    )
    follows(cached, ByHand(model, ["refiner", "blocks"]), generation(TOY, STEPS))
    assert cached.cache_report().blocks == {"refiner": 2, "blocks": DEPTH}


@pytest.mark.parametrize(
    "choose",
    [lambda _: "blocks", lambda m: [m.blocks], lambda m: m.blocks],
    ids=["by name", "by module in a list", "by module"],
)
def test_a_sequential_trunk_is_named(choose: Callable[[Any], Any]) -> None:
    model = make(SequentialDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, blocks=choose(model))
    by_hand = ByHand(model, ["blocks"])
    with runs_of(list(model.blocks)) as counts:
        follows(cached, by_hand, generation(TOY, STEPS))
    assert counts == [3] * DEPTH
    assert cached.cache_report().cached_blocks == {"blocks": (0, 1, 2)}


def test_a_named_list_that_is_not_called_is_refused() -> None:
    cached = dit_cache_fx.apply(
        make(UnusedListDiT), "deepcache", no_cache_steps={0}, blocks=["spare"]
    )
    with pytest.raises(
        DiscoveryError, match=r"blocks=\['spare'\]: the model did not call these lists"
    ):
        cached(**toy_inputs(1.0))


def test_named_lists_are_in_the_order_of_their_calls_also_inside_other_modules() -> None:
    official = case("OfficialHunyuanVideo15Single")
    model = official.build()
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, blocks=["single_blocks", "txt_in.blocks"]
    )
    cached(**official.inputs(1000.0))
    assert cached.cache_report().blocks == {"txt_in.blocks": 2, "single_blocks": 2}


# --- the timestep ---------------------------------------------------------------------------------


def test_a_timestep_of_another_name_is_found_where_nothing_else_can_be_it() -> None:
    model = make(TauDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    by_hand = ByHand(model, ["blocks"])
    for computes, inputs in generation(TOY, STEPS):
        inputs["tau"] = inputs.pop("timestep")
        assert torch.equal(cached(**inputs), by_hand(computes, **inputs))
    assert actions(cached) == "CrCCrr"


def two_taus() -> tuple[nn.Module, dict[str, Any]]:
    inputs = toy_inputs(0.0)
    inputs["tau"] = inputs.pop("timestep")
    return make(TwoTausDiT), inputs | {"rho": torch.tensor([0.5])}


def test_an_ambiguous_timestep_lists_the_candidates() -> None:
    model, inputs = two_taus()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    with pytest.raises(
        DiscoveryError,
        match=r"cannot determine the timestep argument.*\['tau', 'rho'\]. Name it: timestep='...'",
    ):
        cached(**inputs)


def test_of_several_the_one_that_a_word_of_its_name_tells() -> None:
    class Timed(ToyDiT):
        def forward(  # type: ignore[override]
            self, x: Tensor, image_timesteps: Tensor, text: Tensor, image_rows: Tensor
        ) -> Any:
            return super().forward(x[:, image_rows], image_timesteps, text)

    cached = dit_cache_fx.apply(make(Timed), "deepcache", no_cache_steps=STEPS)
    for _, inputs in generation(TOY, STEPS):
        inputs["image_timesteps"] = inputs.pop("timestep")
        cached(**inputs, image_rows=torch.arange(3))
    assert actions(cached) == "CrCCrr"


@pytest.mark.parametrize("name", ["tau", "rho"])
def test_a_named_timestep_tells_the_step(name: str) -> None:
    model, inputs = two_taus()
    cached: CachedModel = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps=STEPS, timestep=name
    )
    by_hand = ByHand(model, ["blocks"])
    for index in range(6):
        given = inputs | {name: torch.tensor([1.0 - index / 10])}
        assert torch.equal(cached(**given), by_hand(index in STEPS, **given))
    assert actions(cached) == "CrCCrr"


def test_a_named_timestep_may_be_a_number_under_any_name() -> None:
    class Gamma(ToyDiT):
        def forward(self, x: Tensor, gamma: Any, text: Tensor) -> Any:  # type: ignore[override]
            time = torch.as_tensor(gamma, dtype=torch.float32).reshape(1)
            return super().forward(x, time, text)

    model = make(Gamma)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, timestep="gamma")
    by_hand = ByHand(model, ["blocks"])
    for index, (computes, inputs) in enumerate(generation(TOY, STEPS)):
        inputs.pop("timestep")
        inputs["gamma"] = 900 - 100 * index
        assert torch.equal(cached(**inputs), by_hand(computes, **inputs))
    assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 1


def test_usual_names_come_first_in_their_order() -> None:
    class Both(ToyDiT):
        def forward(self, x: Tensor, sigma: Tensor, timestep: Tensor, text: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x * sigma[:, None, None], timestep, text)

    cached = dit_cache_fx.apply(make(Both), "deepcache", no_cache_steps={0})
    for t in (900.0, 700.0):
        cached(**toy_inputs(t), sigma=torch.ones(1))
    assert [r.timestep for r in cached.cache_report().timeline] == [900.0, 700.0]


@pytest.mark.parametrize(
    "name", ["timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_level"]
)
def test_usual_names_of_the_timestep(name: str) -> None:
    """Found beside another argument of a timestep's form."""
    namespace: dict[str, Any] = {"ToyDiT": ToyDiT}
    exec(
        "class Named(ToyDiT):\n"
        f"    def forward(self, x, scale, {name}, text):\n"
        f"        return super().forward(x * scale, {name}, text)\n",
        namespace,
    )
    cached = dit_cache_fx.apply(make(namespace["Named"]), "deepcache", no_cache_steps={0})
    for t in (900.0, 700.0):
        inputs = toy_inputs(t)
        inputs[name] = inputs.pop("timestep")
        cached(**inputs, scale=torch.tensor(2.0))
    assert [r.timestep for r in cached.cache_report().timeline] == [900.0, 700.0]


def test_a_call_without_its_timestep_is_an_error_of_the_model() -> None:
    class Optional(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor | None, text: Tensor) -> Any:  # type: ignore[override]
            time = torch.zeros(1) if timestep is None else timestep
            return super().forward(x, time, text)

    cached = dit_cache_fx.apply(make(Optional), "deepcache", no_cache_steps={0})
    with pytest.raises(dit_cache_fx.DitCacheError, match="timestep"):
        cached(**(toy_inputs(1.0) | {"timestep": None}))


def test_variable_arguments() -> None:
    class Variable(ToyDiT):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:  # type: ignore[override]
            return super().forward(*args, **kwargs)

    class Mixed(ToyDiT):
        def forward(self, x: Tensor, /, *rest: Tensor, text: Tensor, **more: Any) -> Any:  # type: ignore[override]
            return super().forward(x, rest[0], text) * more.get("gain", 1.0)

    model = make(Mixed)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, timestep="rest")
    for computes, inputs in generation(TOY, STEPS):
        x, t, text = inputs.values()
        got, want = (m(x, t, text=text, gain=2.0) for m in (cached, model))
        assert torch.equal(got, want) == computes
    cached = dit_cache_fx.apply(make(Variable), "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(make(ToyDiT), ["blocks"]), generation(TOY, STEPS))


def test_a_list_under_two_names_is_one_list() -> None:
    model = make(ToyDiT)
    model.alias = model.blocks
    assert found_in(model, toy_inputs(1.0)) in ({"blocks": DEPTH}, {"alias": DEPTH})
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))


def test_named_timestep_must_be_an_argument_of_forward() -> None:
    with pytest.raises(OptionError, match=r"timestep='tau': forward has no such argument"):
        dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0}, timestep="tau")


def test_block_lists_of_one_block() -> None:
    model = make(ToyDiT, depth=1)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert cached.cache_report().blocks == {"blocks": 1}
