"""`checksum`: exact over bits and places, whatever the layout, in little memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache_fx.values.checksum import checksum, equal

KINDS = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def of(tensor: torch.Tensor) -> tuple[int, int]:
    first, second = checksum(tensor).tolist()
    return first, second


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    values = bits % 2 if dtype == torch.bool else bits
    return values.flatten().view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_each_bit_and_its_place_counts(dtype: torch.dtype) -> None:
    tensor = random(dtype, 5, 7)
    assert of(tensor) == of(tensor.clone())
    raw = tensor.clone().flatten().view(torch.uint8)
    seen = {of(tensor)}
    for byte in range(0, raw.numel(), 3):
        raw[byte] ^= 1
        seen.add(of(raw.view(dtype).reshape(5, 7)))
        raw[byte] ^= 1
    assert len(seen) == 1 + len(range(0, raw.numel(), 3))


def test_all_of_several_tensors_have_to_be_equal() -> None:
    one, two = (checksum(random(torch.float32, size)) for size in (5, 6))
    assert equal([one, two], [one.clone(), two.clone()])
    assert not equal([one, two], [one, one])
    assert not equal([one, two], [two, one])
    assert not equal([one, two], [one])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_strides_do_not_count(dtype: torch.dtype) -> None:
    tensor = random(dtype, 6, 4)
    assert of(tensor.t()) == of(tensor.t().contiguous())
    assert of(tensor[1:, 1:3]) == of(tensor[1:, 1:3].clone())
    assert of(tensor[::2]) == of(tensor[::2].clone())
    assert of(tensor.flatten()[1:]) == of(tensor.flatten()[1:].clone())


def test_an_order_counts() -> None:
    rows = torch.arange(6.0).expand(2, 6)
    seen = {
        of(t)
        for t in (
            rows,
            rows.flip(1),
            rows.roll(1, 1),
            torch.stack([rows[0], rows[1].flip(0)]),
            torch.stack([rows[0].flip(0), rows[1]]),
        )
    }
    assert len(seen) == 5
    long = torch.arange(40_000, dtype=torch.float32)  # periods of the places' weights, too
    assert of(long) != of(long.roll(8191)) != of(long.roll(16384))


def test_two_flipped_signs_do_not_cancel() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        tensor = torch.ones(64, dtype=dtype)
        seen = {of(tensor), of(-tensor)}
        for i in range(1, 64):
            other = tensor.clone()
            other[[0, i]] *= -1
            seen.add(of(other))
        assert len(seen) == 65


def test_signed_zeros_and_nans_are_told_apart() -> None:
    assert of(torch.tensor([0.0])) != of(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert of(nan) == of(nan.clone())


def test_lengths_that_pad_to_the_same_words() -> None:
    assert of(torch.zeros(0)) == (0, 0)
    assert of(torch.ones(3, dtype=torch.uint8)) == of(torch.ones(3, dtype=torch.uint8))
    assert of(torch.tensor(2.0)) == of(torch.tensor([2.0]))


def test_conjugates_and_expanded_and_sparse() -> None:
    z = random(torch.complex64, 4, 4)
    assert of(z.conj()) == of(z.conj().resolve_conj()) != of(z)
    assert of(torch.ones(1).expand(9)) == of(torch.ones(9))
    assert of(torch.eye(3).to_sparse()) == of(torch.eye(3))


def test_a_single_element_of_any_stride() -> None:
    for one in (torch.ones(()).expand(1), torch.ones(9)[::5][:1], torch.ones(()).expand(1, 1)):
        assert one.stride(-1) != 1
        assert of(one) == of(torch.ones(1)) != of(torch.zeros(1))


def test_large_tensors_are_read_in_pieces() -> None:
    """Whatever its layout, and each piece counts with its place."""
    large = random(torch.bfloat16, 3, 1000, 999)
    assert of(large) == of(large.transpose(0, 2).contiguous().transpose(0, 2))
    other = large.clone()
    other[2, 999, 998] *= -1
    assert of(other) != of(large)
    assert of(large.flip(0)) != of(large)


def test_no_temporary_is_larger_than_a_few_mebibytes() -> None:
    tensor = torch.zeros(16 * 2**20, dtype=torch.bfloat16)  # 32 MiB

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for value in pytree.tree_leaves(result):
                storage = value.untyped_storage()
                if storage.data_ptr() != tensor.data_ptr():
                    self.nbytes = max(self.nbytes, storage.nbytes())
            return result

    with Largest() as largest:
        checksum(tensor.reshape(4096, 4096).t())
        checksum(tensor.reshape(1, 1, -1))
    assert 0 < largest.nbytes <= 2 * 2**20


def test_inference_tensors_and_modes_around() -> None:
    plain = torch.arange(10.0)
    with torch.inference_mode():
        assert of(plain.clone()) == of(plain)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert of(plain) == of(plain)
    assert not checksum(plain.clone().requires_grad_()).requires_grad


def test_wrappers_count_by_what_they_hold() -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        tensor = torch.arange(8.0)
        held = distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Replicate()])
        assert of(held) == of(tensor) != of(tensor.flip(0))
    finally:
        dist.destroy_process_group()
