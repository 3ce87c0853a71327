"""Parity with the published helpers of angelslim, where they run and do what they say.

Optional: `pip install --no-deps angelslim`. Without its dependencies the package itself cannot be
imported, so only its cache helpers are loaded, which need nothing but torch.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
import dit_cache_fx.helpers
from dit_cache_fx import interval_schedule
from tests.reference import moving_inputs
from tests.zoo import Case, case, flat

if importlib.util.find_spec("angelslim") is None:
    pytest.skip("pip install --no-deps angelslim", allow_module_level=True)

STEPS = 50
PUBLISHED = interval_schedule(STEPS, 11, 45, 4)
CLOSE = 1e-5
NAMES = ("OfficialHunyuanVideo15", "OfficialHunyuanVideo15Single")

each_model = pytest.mark.parametrize("name", NAMES)


pytestmark = pytest.mark.usefixtures("no_grad")


@cache
def helpers() -> ModuleType:
    """The package `angelslim.compressor.diffusion.cache`, without its parents."""
    package = importlib.util.find_spec("angelslim")
    assert package is not None
    (root,) = package.submodule_search_locations or ()
    folder = Path(root) / "compressor" / "diffusion" / "cache"
    name = "angelslim_cache_helpers"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with mock.patch.dict(sys.modules, {"angelslim": None}):  # so it leaves torch.compile out
        spec.loader.exec_module(module)
    return module


@cache
def model_of(name: str) -> nn.Module:
    return case(name).build()


@cache
def uncached(name: str) -> list[Tensor]:
    model = model_of(name)
    return [flat(model(**moving_inputs(case(name), i, STEPS))) for i in range(STEPS)]


def helper_outputs(
    name: str,
    kind: str,
    *,
    package: ModuleType | None = None,
    steps: Collection[int] = PUBLISHED,
    count: int = STEPS,
    **options: Any,
) -> list[Tensor]:
    """A generation with a helper around a copy of the model, told its steps as its users do.

    `package`: where the helper is imported from.
    """
    model = copy.deepcopy(model_of(name))
    helper = getattr(package or helpers(), kind)(
        double_blocks=list(model.double_blocks),
        single_blocks=list(model.single_blocks),
        no_cache_steps=set(steps),
        **options,
    )
    helper.enable()
    helper.clear_states()
    outputs = []
    for step in range(count):
        helper.cur_timestep = step
        outputs.append(flat(model(**moving_inputs(case(name), step, STEPS))))
    return outputs


def cached_outputs(name: str, strategy: str, **options: Any) -> list[Tensor]:
    model_case: Case = case(name)
    cached = dit_cache_fx.apply(model_of(name), strategy, no_cache_steps=PUBLISHED, **options)
    return [flat(cached(**moving_inputs(model_case, i, STEPS))) for i in range(STEPS)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


def skipped(values: list[float]) -> list[float]:
    return [value for step, value in enumerate(values) if step not in PUBLISHED]


def assert_skips_change_the_output(outputs: list[Tensor], name: str) -> None:
    """The helper has wrapped what it was given: else it would be the uncached model."""
    assert min(skipped(errors(outputs, uncached(name)))) > 100 * CLOSE


@each_model
@pytest.mark.parametrize("last_block", [False, True], ids=["all-cached", "last-never-cached"])
def test_deepcache_is_the_helpers_bit_by_bit(name: str, last_block: bool) -> None:
    last = len(model_of(name).double_blocks) - 1
    ids: dict[str, Collection[int]] = {"double_blocks": {last}} if last_block else {}
    want = helper_outputs(name, "DeepCacheHelper", no_cache_block_id=ids)
    got = cached_outputs(name, "deepcache", no_cache_block_id=ids)
    assert_skips_change_the_output(want, name)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_model
@pytest.mark.parametrize(
    "orders",
    [
        {"max_order": 1, "low_freqs_order": 1, "high_freqs_order": 1},
        {"max_order": 2, "low_freqs_order": 2, "high_freqs_order": 2},
        {"max_order": 2, "low_freqs_order": 1, "high_freqs_order": 2},
        {"max_order": 3, "low_freqs_order": 3, "high_freqs_order": 0},
    ],
    ids=lambda orders: "-".join(map(str, orders.values())),
)
def test_taylorcache_is_the_helpers(name: str, orders: dict[str, int]) -> None:
    """The helper ignores its first computed step: its orders are filled before the first skip."""
    want = helper_outputs(name, "TaylorCacheHelper", **orders)
    got = cached_outputs(name, "taylorcache", **orders)
    assert_skips_change_the_output(want, name)
    assert max(errors(got, want)) < CLOSE


@each_model
def test_teacache_of_the_helpers_is_deepcache(name: str) -> None:
    """It adds the residual to the stored input, which gives the stored output: ours moves on."""
    helper = helper_outputs(name, "TeaCacheHelper")
    assert_skips_change_the_output(helper, name)
    assert max(errors(cached_outputs(name, "deepcache"), helper)) < CLOSE
    assert min(skipped(errors(cached_outputs(name, "teacache"), helper))) > 100 * CLOSE


# --- with only the import changed -----------------------------------------------------------------

OURS = dit_cache_fx.helpers
KINDS = ("CacheHelper", "DeepCacheHelper", "TeaCacheHelper", "TaylorCacheHelper")
#: a skip after two computed steps, and later ones
SHORT: dict[str, Any] = {"steps": {0, 1, 4, 7}, "count": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_constructors_and_methods_are_the_published_ones(kind: str) -> None:
    published, ours = getattr(helpers(), kind), getattr(OURS, kind)
    want = [(p.name, p.default) for p in inspect.signature(published).parameters.values()]
    got = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    assert got[: len(want)] == want
    assert all(hasattr(ours(), name) for name in (*dict(want), "cur_timestep"))
    for method in ("enable", "disable", "clear_states", "reset_states"):
        assert inspect.signature(getattr(ours, method)).parameters.keys() == {"self"}


@each_model
@pytest.mark.parametrize("last_block", [False, True], ids=["all-cached", "last-never-cached"])
def test_deepcache_helper_is_the_published_bit_by_bit(name: str, last_block: bool) -> None:
    options = {"no_cache_block_id": {"double_blocks": {2}}} if last_block else {}
    want = helper_outputs(name, "DeepCacheHelper", **SHORT, **options)
    got = helper_outputs(name, "DeepCacheHelper", package=OURS, **SHORT, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_model
def test_teacache_helper_on_the_stored_input_is_the_published(name: str) -> None:
    want = helper_outputs(name, "TeaCacheHelper", **SHORT)
    got = helper_outputs(name, "TeaCacheHelper", package=OURS, stored_input=True, **SHORT)
    assert max(errors(got, want)) < CLOSE
    other = helper_outputs(name, "TeaCacheHelper", package=OURS, **SHORT)
    assert max(errors(other, want)) > 100 * CLOSE


@each_model
def test_taylorcache_helper_without_the_first_step_is_the_published(name: str) -> None:
    want = helper_outputs(name, "TaylorCacheHelper", **SHORT)
    got = helper_outputs(name, "TaylorCacheHelper", package=OURS, skip_first=True, **SHORT)
    assert max(errors(got, want)) < CLOSE
    other = helper_outputs(name, "TaylorCacheHelper", package=OURS, **SHORT)
    assert max(errors(other, want)) > 100 * CLOSE
