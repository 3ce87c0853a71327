"""A checksum of a tensor's bits that depends on their order and needs little memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from dit_cache_fx.values.wrapped import inner

#: bytes of a tensor that are processed at a time: each temporary takes as many
_CHUNK = 2**20

_WORD = 8  # bytes

# # odd, with irregular bits
_PLACE = -7046029254386353131
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685

#: of several tensors
Checksums = list[torch.Tensor]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return two int64 numbers, on the tensor's device, that depend on each bit and its position.

    Tensors of one shape and dtype with equal bits have equal checksums, whatever their strides.
    Different bits give different checksums, except by chance (about 1 in 2^64). The host does not
    wait for the device.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    start = 0
    with torch.no_grad():
        for words in _words(tensor.detach()):
            sums = sums + _mixed(words, start)
            start += words.numel()
    return sums


def equal(a: Checksums, b: Checksums) -> bool:
    """Return whether the checksums are equal."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _mixed(words: torch.Tensor, start: int) -> torch.Tensor:
    """Return two sums over words, each mixed with its position; integers wrap around."""
    end = start + words.numel()
    places = torch.arange(start, end, dtype=torch.int64, device=words.device) * _PLACE
    mixed = (words ^ places).mul_(_FIRST)
    mixed = mixed.bitwise_xor_(mixed >> 32).mul_(_SECOND)
    mixed = mixed.bitwise_xor_(mixed >> 29)
    first = mixed.sum()
    return torch.stack([first, mixed.mul_(places.bitwise_or_(1)).sum()])


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor's bits in the order of its elements, as int64, in chunks."""
    for plain in _plain(tensor):
        yield from map(_as_words, _pieces(plain))


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors with data that the tensor consists of: itself, unless it is a wrapper."""
    for part in inner(tensor):
        if part.is_quantized:
            yield part.int_repr()
        else:
            yield part if part.layout is torch.strided else part.to_dense()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield parts of at most `_CHUNK` bytes, in order. The split depends on the shape only."""
    if tensor.numel() * tensor.element_size() <= _CHUNK:
        yield tensor
        return
    dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
    for half in tensor.tensor_split(2, dim):
        yield from _pieces(half)


def _as_words(piece: torch.Tensor) -> torch.Tensor:
    """Return the bits of a small tensor as int64, padded with zeros."""
    size = piece.element_size()
    whole = piece.resolve_conj().resolve_neg().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # one element may have any stride
    missing = -flat.numel() * size % _WORD
    if not missing and flat.storage_offset() * size % _WORD == 0:
        return flat.view(torch.int64)
    return pad(flat.view(torch.uint8), (0, missing)).view(torch.int64)
