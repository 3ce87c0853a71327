"""What cannot work is refused with a text that says what would, before anything is changed."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from dit_cache_fx import (
    CaptureError,
    DeepCache,
    DiscoveryError,
    DitCacheError,
    DitCacheWarning,
    OptionError,
    Strategy,
    TaylorCache,
    TeaCache,
    VerifyError,
    interval_schedule,
)
from tests.toys import STEPS_OF_SIX, TOY, JoinedDiT, ToyDiT, generation, make, toy_inputs
from tests.zoo import case

pytestmark = pytest.mark.usefixtures("no_grad")


def state_of(model: Any) -> Any:
    """Everything about a module tree that `apply` could change."""
    if not isinstance(model, nn.Module):
        return None
    return [
        (name, {key: id(value) for key, value in vars(module).items()}, module.training)
        for name, module in model.named_modules()
    ]


def refused(
    match: str, model: Any, strategy: Any = "deepcache", error: Any = OptionError, **options: Any
) -> None:
    """Assert that `apply` refuses, with a text that matches, and that nothing was changed."""
    before, call = state_of(model), nn.Module.__call__
    with pytest.raises(error, match=match) as caught:
        dit_cache_fx.apply(model, strategy, **options)
    assert isinstance(caught.value, DitCacheError)
    assert state_of(model) == before
    assert nn.Module.__call__ is call


# --- the strategy -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["deep_cache", "", None, 3, DeepCache, ["deepcache"]])
def test_unknown_strategy(strategy: Any) -> None:
    refused(
        r"strategy=.*: one of \['dbcache', 'deepcache', 'easycache', .*'teacache'\], or a Str",
        make(ToyDiT),
        strategy,
        no_cache_steps={0},
    )


@pytest.mark.parametrize(
    ("strategy", "option"),
    [
        ("deepcache", "max_order"),
        ("deepcache", "steps"),
        ("teacache", "max_order"),
        ("taylorcache", "rel_l1_thresh"),
    ],
)
def test_unknown_option_lists_those_there_are(strategy: str, option: str) -> None:
    refused(
        rf"{option}=1: {strategy} has no such option; it has \[.*'no_cache_steps'.*\]",
        make(ToyDiT),
        strategy,
        no_cache_steps={0},
        **{option: 1},
    )


def test_a_strategy_object_takes_no_options() -> None:
    refused(
        r"strategy=DeepCache\(.*an object has its options already; got \['no_cache_steps'\]",
        make(ToyDiT),
        DeepCache(no_cache_steps={0}),
        no_cache_steps={1},
    )


def test_a_strategy_object_is_used_as_it_is() -> None:
    strategy = DeepCache(no_cache_steps=STEPS_OF_SIX)
    cached = dit_cache_fx.apply(make(ToyDiT), strategy)
    for _, inputs in generation(TOY, STEPS_OF_SIX):
        cached(**inputs)
    assert cached.cache_report().calls_computed == 3


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("deepcache", ""), ("taylorcache", "; or pass a tolerance, for example tolerance=0.01")],
)
def test_no_schedule_at_all(strategy: str, more: str) -> None:
    refused(
        r"no_cache_steps=None: the indices of the steps to compute in full, for example "
        r"interval_schedule\(50, 11, 45, 4\) or range\(0, 50, 2\), or instead compute_ratio=0.5 or "
        rf"schedule='balanced'{more}$",
        make(ToyDiT),
        strategy,
    )


def test_no_schedule_at_all_for_teacache_names_its_rule() -> None:
    refused(
        r"no_cache_steps=None: .*; or pass rel_l1_thresh \(the dynamic rule\)",
        make(ToyDiT),
        "teacache",
    )


@pytest.mark.parametrize("steps", [{-1}, [0, -3], {0, 1.5}, [True], {"0"}, 7, "013", [None]])
def test_steps_that_are_no_indexes(steps: Any) -> None:
    refused(
        r"no_cache_steps=.*: a collection of step indices: integers from 0",
        make(ToyDiT),
        no_cache_steps=steps,
    )


@pytest.mark.parametrize(
    "steps", [range(0, 50, 2), {0, 1}, [3, 3, 1], (5,), iter([1, 2]), torch.tensor([0, 2]), set()]
)
def test_steps_may_be_any_collection_of_integers(steps: Any) -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=steps)
    assert cached(**toy_inputs(1.0)).isfinite().all()


# --- block ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ({"blocks": {3}}, r"blocks has 3 blocks, ids 0 to 2; got \[3\]"),
        ({"blocks": {0, 7, 53}}, r"blocks has 3 blocks, ids 0 to 2; got \[7, 53\]"),
        ({"double_blocks": {3}}, r"double_blocks has 3 blocks, ids 0 to 2; got \[3\]"),
        ({"layers": {0}}, r"no block list of this name; the lists are \['blocks'"),
        (
            {"blocks": {-1}},
            r"a mapping from the name of a block list to a collection of block indices",
        ),
        ({"blocks": {True}}, r".*integers from 0"),
        ({"blocks": {0.5}}, r".*integers from 0"),
        ({"blocks": 2}, r".*integers from 0"),
        ([2], r"a mapping from the name of a block list"),
        (2, r"a mapping from the name of a block list"),
    ],
)
def test_block_ids_that_cannot_be(ids: Any, match: str) -> None:
    refused(
        r"no_cache_block_id=.*: " + match,
        make(ToyDiT),
        no_cache_steps={0},
        no_cache_block_id=ids,
    )


def test_block_ids_of_named_lists_are_checked_at_once() -> None:
    refused(
        r"no_cache_block_id=\{'single_blocks': \[0\]\}: no block list of this name; "
        r"the lists are \['blocks'\] \(or \['double_blocks'\] in call order\)",
        make(ToyDiT),
        no_cache_steps={0},
        no_cache_block_id={"single_blocks": {0}},
        blocks="blocks",
    )


def test_block_ids_of_lists_that_are_not_the_trunk_are_refused_by_the_first_call() -> None:
    official = case("OfficialHunyuanVideo15Single")
    model = official.build()
    before = state_of(model)
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, no_cache_block_id={"txt_in.blocks": {0}}
    )
    with pytest.raises(OptionError, match=r"the lists are \['double_blocks', 'single_blocks'\]"):
        cached(**official.inputs(1.0))
    assert state_of(model) == before


def test_the_second_alias_needs_a_second_list() -> None:
    cached = dit_cache_fx.apply(
        make(ToyDiT), "deepcache", no_cache_steps={0}, no_cache_block_id={"single_blocks": {0}}
    )
    with pytest.raises(OptionError, match=r"no block list of this name"):
        cached(**toy_inputs(1.0))


def test_every_block_excluded_computes_every_step() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, no_cache_block_id={"blocks": range(3)}
    )
    for _, inputs in generation(TOY, {0}):
        assert torch.equal(cached(**inputs), model(**inputs))
    assert cached.cache_report().bytes_held == 0


# --- options of TeaCache and TaylorCache --------------------------------------------------------


@pytest.mark.parametrize("option", ["max_order", "low_freqs_order", "high_freqs_order"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_orders_that_cannot_be(option: str, value: Any) -> None:
    refused(
        rf"{option}=.*: an integer from 0",
        make(ToyDiT),
        "taylorcache",
        no_cache_steps={0},
        **{option: value},
    )


@pytest.mark.parametrize("value", [0, -0.1, math.nan, True, "0.1"])
def test_thresholds_that_cannot_be(value: Any) -> None:
    refused(
        r"rel_l1_thresh=.*: a number above 0, for example 0.15",
        make(ToyDiT),
        "teacache",
        rel_l1_thresh=value,
    )


@pytest.mark.parametrize("value", [[], 3, [1.0, math.nan], [math.inf], [None]])
def test_coefficients_that_cannot_be(value: Any) -> None:
    refused(
        r"coefficients=.*: a sequence of finite numbers, highest power first",
        make(ToyDiT),
        "teacache",
        rel_l1_thresh=0.1,
        coefficients=value,
    )


def test_coefficients_without_a_threshold() -> None:
    refused(
        r"coefficients=\[1.0, 0.0\]: only used with rel_l1_thresh: pass both",
        make(ToyDiT),
        "teacache",
        no_cache_steps={0},
        coefficients=[1.0, 0.0],
    )


@pytest.mark.parametrize("value", ["output", "", 1])
def test_signals_that_there_are_not(value: Any) -> None:
    refused(
        r"signal=.*: one of \['modulated', 'input', 'conditioning', 'embedding'\]",
        make(ToyDiT),
        "teacache",
        rel_l1_thresh=0.1,
        signal=value,
    )


@pytest.mark.parametrize("value", [None, 1, ["img"]])
def test_cache_names_that_cannot_be(value: Any) -> None:
    refused(
        r"cache_name=.*: the name of a block argument",
        make(ToyDiT),
        "teacache",
        no_cache_steps={0},
        cache_name=value,
    )


def test_a_cache_name_that_no_block_has_is_found_from_the_graph() -> None:
    model = make(JoinedDiT)
    by_name, found = (
        dit_cache_fx.apply(model, "teacache", no_cache_steps={0}, cache_name=name)
        for name in ("h", "no such name")
    )
    for _, inputs in generation(TOY, {0}, steps=3):
        assert torch.equal(by_name(**inputs), found(**inputs))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DeepCache, {}),
        (TeaCache, {"rel_l1_thresh": 0}),
        (TaylorCache, {"no_cache_steps": {0}, "max_order": -1}),
    ],
)
def test_strategy_objects_are_refused_when_they_are_made(
    kind: type[Strategy], options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        kind(**options)


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, torch.sin, ToyDiT, "model", object()])
def test_a_model_that_is_none(model: Any) -> None:
    refused(r"model=.*: an nn.Module", model, no_cache_steps={0})


def test_a_model_in_training_mode() -> None:
    refused(
        r"model.training=True: call model.eval\(\) first", make(ToyDiT).train(), no_cache_steps={0}
    )


def test_a_compiled_model() -> None:
    refused(
        r"model='ToyDiT': call apply first, then torch.compile"
        r"|model='OptimizedModule': call apply first, then torch.compile",
        torch.compile(make(ToyDiT), backend="eager"),
        no_cache_steps={0},
    )


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())])
def test_a_model_without_any_block_list(model: nn.Module) -> None:
    refused(
        r"no block list found: the model holds no nn.ModuleList",
        model.eval(),
        error=DiscoveryError,
        no_cache_steps={0},
    )


@pytest.mark.parametrize("blocks", ["layers", ["blocks", "layers"], "blocks.0", "head", ""])
def test_named_blocks_that_there_are_not(blocks: Any) -> None:
    refused(
        r"blocks=.*: no such module list in the model; it has \['blocks'\]",
        make(ToyDiT),
        no_cache_steps={0},
        blocks=blocks,
    )


def test_blocks_of_another_model() -> None:
    refused(
        r"blocks='ModuleList': no such module list in the model; it has \['blocks'\]",
        make(ToyDiT),
        no_cache_steps={0},
        blocks=make(ToyDiT).blocks,
    )


def test_an_empty_choice_of_blocks() -> None:
    refused(
        r"blocks=\[\]: at least one block list, or None to determine them",
        make(ToyDiT),
        no_cache_steps={0},
        blocks=[],
    )


@pytest.mark.parametrize("blocks", [3, [3], [None], object()])
def test_blocks_of_a_wrong_type(blocks: Any) -> None:
    refused(r"blocks=", make(ToyDiT), no_cache_steps={0}, blocks=blocks)


@pytest.mark.parametrize("timestep", ["t", "", "timesteps", 3])
def test_a_timestep_that_is_no_argument(timestep: Any) -> None:
    refused(
        r"timestep=.*: forward has no such argument; it has \['x', 'timestep', 'text'\]",
        make(ToyDiT),
        no_cache_steps={0},
        timestep=timestep,
    )


# --- interval_schedule --------------------------------------------------------------------------


def test_interval_schedule_of_hunyuan_video() -> None:
    steps = interval_schedule(50, 11, 45, 4)
    assert steps == {*range(11), *range(11, 45, 4), *range(45, 50)}
    assert len(steps) == 25


def test_interval_schedule_at_its_ends() -> None:
    assert interval_schedule(0, 0, 0, 1) == set()
    assert interval_schedule(5, 0, 5, 9) == {0}
    assert interval_schedule(5, 2, 2, 1) == set(range(5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1, 0, 0, 1), r"num_steps=-1: an integer from 0"),
        ((5.0, 0, 0, 1), r"num_steps=5.0: an integer from 0"),
        ((True, 0, 0, 1), r"num_steps=True: an integer from 0"),
        ((5, -1, 5, 1), r"start=-1: an integer from 0"),
        ((5, 0, "5", 1), r"end='5': an integer from 0"),
        ((5, 0, 5, 0), r"interval=0: an integer from 1"),
        ((5, 0, 5, 1.5), r"interval=1.5: an integer from 1"),
        ((5, 0, 5, True), r"interval=True: an integer from 1"),
        ((5, 4, 3, 1), r"start=4: start <= end=3 <= num_steps=5 must hold"),
        ((5, 0, 6, 1), r"start=0: start <= end=6 <= num_steps=5 must hold"),
    ],
)
def test_interval_schedule_refuses(arguments: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        interval_schedule(*arguments)


# --- the errors themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [OptionError, DiscoveryError, CaptureError, VerifyError])
def test_errors_have_one_base(error: type[Exception]) -> None:
    assert issubclass(error, DitCacheError)
    assert not issubclass(error, Warning)


def test_option_errors_are_value_errors_that_know_name_and_value() -> None:
    with pytest.raises(ValueError, match="max_order") as caught:
        TaylorCache(no_cache_steps={0}, max_order=-2)
    assert isinstance(caught.value, OptionError)
    assert (caught.value.name, caught.value.value) == ("max_order", -2)


def test_option_errors_survive_pickling() -> None:
    """As they must where a worker process raises them."""
    error = OptionError("max_order", -2, "an integer from 0")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.name, again.value) == (error.name, error.value)


def test_the_warning_is_a_user_warning() -> None:
    assert issubclass(DitCacheWarning, UserWarning)
    assert not issubclass(DitCacheWarning, DitCacheError)


@pytest.mark.parametrize("name", [None, 3, ["cond"]])
def test_cache_context_names_that_cannot_be(name: Any) -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0})
    with pytest.raises(OptionError, match=r"name=.*: the name of a branch, such as 'cond'"):
        cached.cache_context(name)


def test_a_strategy_of_ones_own_that_gives_a_wrong_number_of_tensors() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two(DeepCache):
        def slots(self) -> int:
            return 2

    cached = dit_cache_fx.apply(make(ToyDiT), Two(no_cache_steps={0}))
    with pytest.raises(VerifyError, match=r"strategy Two: store gave 1 tensors, 2 expected"):
        cached(**toy_inputs(1.0))
