"""Each model of the zoo against itself and a reference, in bfloat16 and float16; all on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dit_cache_fx
from tests.device.places import CUDA, on
from tests.reference import DeepCacheReference, TaylorReference, moving_inputs
from tests.zoo import CASES, Case, flat
from tests.zoo.representatives import marks_of

STEPS, COMPUTED = 5, (0, 2, 3)

#: on the CPU bfloat16 by default, the other dtype with the rest
everywhere = [
    pytest.param(
        case,
        dtype,
        *device.values,
        id=f"{case.name}-{str(dtype)[6:]}-{device.values[0]}",
        marks=[
            *device.marks,
            *(marks_of(case.name, dtype == torch.bfloat16) if device.values[0] == "cpu" else ()),
        ],
    )
    for device in (pytest.param("cpu"), CUDA)
    for case in CASES
    for dtype in (*case.half, *[torch.float32] * (device.values[0] != "cpu"))
]
each_model = pytest.mark.parametrize(("model_case", "dtype", "device"), everywhere)


def generation(model_case: Case, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """The arguments of each step; what does not change is the same tensor."""
    made = [on(device, moving_inputs(model_case, i, STEPS, dtype=dtype)) for i in range(STEPS)]
    first = made[0]
    return [{k: _same(first[k], v) for k, v in inputs.items()} for inputs in made]


def _same(first: Any, now: Any) -> Any:
    both = isinstance(first, torch.Tensor) and isinstance(now, torch.Tensor)
    return first if both and first.shape == now.shape and torch.equal(first, now) else now


@each_model
@torch.no_grad()
def test_deepcache_is_bitwise(model_case: Case, dtype: torch.dtype, device: str) -> None:
    """Computed steps are those of the model, reused ones those of blocks cached one by one."""
    model: nn.Module = model_case.build().to(device, dtype)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=COMPUTED)
    reference = DeepCacheReference(model, model_case.block_lists, COMPUTED)
    for step, inputs in enumerate(generation(model_case, dtype, device)):
        got = flat(cached(**inputs))
        assert got.dtype == dtype
        if step in COMPUTED:
            assert torch.equal(got, flat(model(**inputs))), step
        assert torch.equal(got, flat(reference(step, inputs))), step
    assert cached.cache_report().calls_reused == STEPS - len(COMPUTED)


@each_model
@torch.no_grad()
def test_taylorcache_is_that_of_the_reference(
    model_case: Case, dtype: torch.dtype, device: str
) -> None:
    """Predictions in the model's own dtype: as far off as rounding lets two orders of sums be."""
    model: nn.Module = model_case.build().to(device, dtype)
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=COMPUTED, max_order=1)
    reference = TaylorReference(model, model_case.block_lists, COMPUTED, max_order=1)
    for step, inputs in enumerate(generation(model_case, dtype, device)):
        got, want = flat(cached(**inputs)), flat(reference(step, inputs))
        if step in COMPUTED:
            assert torch.equal(got, flat(model(**inputs))), step
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < max(20 * torch.finfo(dtype).eps, 1e-4), (step, float(error))
