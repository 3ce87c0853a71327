"""Sizes that depend on data, where they are fixed."""

from __future__ import annotations

import pytest
import torch

from dit_cache_fx.lowering.preamble import fixed_shape


def test_a_tensor_of_the_fixed_shape_is_as_it_was() -> None:
    tensor = torch.randn(4, 3, 2).transpose(0, 1)
    fixed = fixed_shape(tensor, [3, 4, 2])
    assert torch.equal(fixed, tensor)
    assert fixed.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 9), (2, 7), (3, 8)])
def test_another_size_raises_and_is_not_cut(shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError):
        fixed_shape(torch.zeros(shape), [2, 8])
