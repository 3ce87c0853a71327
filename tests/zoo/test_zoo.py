"""The zoo's models depend on all that a cache could get wrong: time, prompt, sample, blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import CASES, Case, case, flat
from tests.zoo.representatives import KINDS, every_case

each_half = pytest.mark.parametrize(
    ("model_case", "dtype"),
    [pytest.param(c, d, id=f"{c.name}-{d}") for c in CASES for d in c.half],
)

# Far above rounding (1e-6), and below what any single input or block changes (5e-2 and more).
CLEARLY = 0.02


pytestmark = pytest.mark.usefixtures("no_grad")


@cache
def model_of(model_case: Case) -> nn.Module:
    return model_case.build()


def output(model_case: Case, step: int = 2, **kwargs: Any) -> Tensor:
    timestep = model_case.timesteps(8)[step]
    return flat(model_of(model_case)(**model_case.inputs(timestep, **kwargs)))


def relative_change(old: Tensor, new: Tensor) -> float:
    return ((new - old).norm() / old.norm()).item()


@contextmanager
def scaled(block: nn.Module, factor: float) -> Iterator[None]:
    """Scale a block's parameters, restoring them exactly."""
    state = {name: parameter.clone() for name, parameter in block.named_parameters()}
    try:
        for parameter in block.parameters():
            parameter.mul_(factor)
        yield
    finally:
        for name, parameter in block.named_parameters():
            parameter.copy_(state[name])


@every_case
def test_build_is_deterministic_and_leaves_the_rng_alone(model_case: Case) -> None:
    before = torch.get_rng_state()
    rebuilt = model_case.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not rebuilt.training
    other = model_of(model_case).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in rebuilt.state_dict().items())


@every_case
def test_forward_is_deterministic_and_of_order_one(model_case: Case) -> None:
    first, again = output(model_case), output(model_case)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert 0.3 < first.std().item() < 3


@every_case
def test_timestep_argument_is_one_value_per_row(model_case: Case) -> None:
    timesteps = model_case.timesteps(8)
    assert len(set(timesteps)) == 8
    timestep = model_case.inputs(timesteps[0], batch=2)[model_case.timestep_arg]
    assert timestep.shape == (2,)


@every_case
def test_inputs_are_arguments_of_forward(model_case: Case) -> None:
    parameters = inspect.signature(model_of(model_case).forward).parameters
    assert set(model_case.inputs(model_case.timesteps(8)[0])) <= set(parameters)


@every_case
@pytest.mark.parametrize(
    "change", [{"step": 3}, {"prompt": 1}, {"prompt": 2}, {"seed": 1}], ids=str
)
def test_output_depends_on(model_case: Case, change: dict[str, int]) -> None:
    assert relative_change(output(model_case), output(model_case, **change)) > CLEARLY


@every_case
def test_output_depends_on_every_trunk_block(model_case: Case) -> None:
    model, before = model_of(model_case), output(model_case)
    for name in model_case.block_lists:
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        assert len(blocks) >= 2
        for block in blocks:
            with scaled(block, 1.1):
                assert relative_change(before, output(model_case)) > CLEARLY
    assert torch.equal(output(model_case), before)


@every_case
def test_trunk_blocks_run_in_order(model_case: Case) -> None:
    model = model_of(model_case)
    expected = [each for name in model_case.block_lists for each in model.get_submodule(name)]
    ran: list[nn.Module] = []
    hooks = [each.register_forward_pre_hook(lambda m, _: ran.append(m)) for each in expected]
    try:
        output(model_case)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == expected


@every_case
def test_other_resolution(model_case: Case) -> None:
    larger = output(model_case, size=1)
    assert larger.isfinite().all()
    assert larger.numel() > output(model_case, size=0).numel()


@every_case
@pytest.mark.parametrize("prompt", [0, 2])
def test_batch_rows_are_the_single_rows(model_case: Case, prompt: int) -> None:
    single = output(model_case, prompt=prompt)
    first, second = output(model_case, prompt=prompt, batch=2).chunk(2)
    torch.testing.assert_close(first, single, rtol=1e-4, atol=1e-4)
    assert relative_change(first, second) > CLEARLY


@each_half
def test_half_precision(model_case: Case, dtype: torch.dtype) -> None:
    inputs = model_case.inputs(model_case.timesteps(8)[4], dtype=dtype)
    half = flat(model_case.build().to(dtype)(**inputs))
    assert half.dtype == dtype
    # The same rounded inputs, so that only the arithmetic differs.
    exact = flat(model_of(model_case)(**pytree.tree_map(_as_float32, inputs)))
    assert relative_change(exact, half.float()) < 0.05


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ["text_states_2", "timestep_r", "guidance"])
def test_official_form_takes_optional_conditioning(name: str) -> None:
    official = case("OfficialHunyuanVideo15Single")
    inputs = official.inputs(500.0)
    value = torch.ones(1, 10) if name == "text_states_2" else torch.full([1], 300.0)
    with_value = flat(model_of(official)(**(inputs | {name: value})))
    assert relative_change(flat(model_of(official)(**inputs)), with_value) > CLEARLY


def test_official_form_returns_a_pair_or_a_dict() -> None:
    official = case("OfficialHunyuanVideo15Single")
    model, inputs = model_of(official), official.inputs(500.0)
    image, nothing = model(**inputs)
    assert nothing is None
    assert image.shape == (1, 4, 2, 8, 8)
    assert torch.equal(model(**(inputs | {"return_dict": True}))["x"], image)
    _, features = model(**(inputs | {"output_features": True}))
    assert [each.shape for each in features] == [(1, 32, 32)] * 2


def test_the_representatives_are_models_of_the_zoo() -> None:
    assert {c.name for c in CASES} >= KINDS.keys()
