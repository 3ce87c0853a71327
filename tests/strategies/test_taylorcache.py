"""The derivatives of TaylorCache, from one computed step to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_cache_fx.strategies import CLOCK, Clock
from dit_cache_fx.strategies.taylorcache import derivatives, split_bands


def clock(distance: float, computed: int) -> Clock:
    given = {name: spec.zeros() for name, spec in CLOCK.items()}
    given |= {"distance": torch.tensor(distance), "computed": torch.tensor(computed)}
    return Clock(**given)


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    return [tensor.item() for tensor in tensors]


def test_an_order_without_a_predecessor_is_zero() -> None:
    """Of one value there is no slope, of two of them no bend."""
    one = derivatives(torch.tensor(4.0), [torch.zeros(())] * 3, clock(0, 0))
    assert numbers(one) == [4.0, 0.0, 0.0]
    two = derivatives(torch.tensor(10.0), one, clock(2, 1))
    assert numbers(two) == [10.0, 3.0, 0.0]
    three = derivatives(torch.tensor(18.0), two, clock(4, 2))
    assert numbers(three) == [18.0, 2.0, -0.25]


def test_a_second_evaluation_keeps_the_differences() -> None:
    held = [torch.tensor(number) for number in (10.0, 3.0, 1.0)]
    assert numbers(derivatives(torch.tensor(11.0), held, clock(0, 3))) == [11.0, 3.0, 1.0]


def test_the_bands_add_up_in_the_usual_layout() -> None:
    """Layers round differently in another layout: a compiled step would not be the eager one."""
    value = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    low, high = split_bands(value)
    torch.testing.assert_close(low + high, value)
    assert low.is_contiguous()
    assert high.is_contiguous()
