"""Values on a device that are known without a wait; told on the CPU, where nothing is faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_cache_fx.values.host_copies import KNOWN, MOST, HostCopies


class Reads(HostCopies):
    """Counts how often it reads a tensor."""

    count = 0

    def _read(self, tensor: Tensor) -> object:  # type: ignore[override]
        self.count += 1
        return super()._read(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
def test_the_parts_of_a_tensor_are_known_from_the_first_one_on(dtype: torch.dtype) -> None:
    copies, timesteps = Reads(), torch.linspace(999, 1, 20).to(dtype)
    for timestep in timesteps:
        for part in (timestep, timestep[None], timestep.expand(4), timestep.expand(2, 3)):
            assert copies.value(part) == timestep.item()
    assert copies.count == 1
    assert copies.value(timesteps[3:][2]) == timesteps[5].item()
    assert copies.value(timesteps.view(4, 5)[1, 1]) == timesteps[6].item()
    assert copies.count == 1


def test_what_was_changed_in_place_is_read_again() -> None:
    copies, timesteps = Reads(), torch.linspace(999, 1, 20)
    part = timesteps[3]
    for change in (
        lambda: timesteps.mul_(0.5),
        lambda: timesteps[3].fill_(7.0),
        lambda: part.add_(1.0),
        lambda: timesteps.detach()[2:5].sub_(1.0),
    ):
        assert copies.value(part) == part.item()
        before = copies.count
        change()
        assert copies.value(part) == part.item()
        assert copies.count == before + 1


def alone() -> Tensor:
    return torch.tensor(3.0)


def one_element() -> Tensor:
    return torch.tensor([3.0])


def of_a_batch() -> Tensor:
    return torch.tensor([3.0, 3.0])


def large() -> Tensor:
    return torch.zeros(MOST + 1)[0]


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(9)[3]


def nothing() -> Tensor:
    return torch.zeros(9)[3:3]


@pytest.mark.parametrize(
    "make", [alone, one_element, of_a_batch, large, inferred, nothing], ids=lambda f: f.__name__
)
def test_where_it_is_in_doubt_nothing_is_known(make: Callable[[], Tensor]) -> None:
    copies = Reads()
    assert copies.value(make()) is None
    assert copies.count == 0


def test_memory_that_was_freed_is_no_evidence() -> None:
    """Another tensor may get it: what is known is held until it is given up."""
    copies = Reads()
    for number in range(50):
        timesteps = torch.full([20], float(number))
        assert copies.value(timesteps[4]) == number
        del timesteps  # freed at once: nothing refers to it in a circle
    assert copies.count == 50
    assert len(copies._known) == KNOWN


def test_several_runs_in_turn() -> None:
    copies = Reads()
    runs = [torch.linspace(900 + number, 1, 10) for number in range(KNOWN)]
    for step in range(10):
        for run in runs:
            assert copies.value(run[step]) == run[step].item()
    assert copies.count == KNOWN
    other = torch.linspace(5, 1, 10).to(torch.int64)
    assert copies.value(other[2]) == other[2].item()
    assert len(copies._known) == KNOWN


def test_the_same_memory_as_another_dtype_is_read_as_that() -> None:
    copies, memory = Reads(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert copies.value(memory[1]) == 2.0
    assert copies.value(memory.view(torch.int32)[1]) == memory.view(torch.int32)[1].item()
    assert copies.value(memory[2]) == 3.0
