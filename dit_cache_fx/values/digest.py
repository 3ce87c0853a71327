"""A few numbers that tell two tensors apart, made where the tensor is, in bounded memory."""

from __future__ import annotations

import torch
from torch import nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: how many elements are looked at together
_PIECE = 1 << 20


#: of several tensors
Digests = list[torch.Tensor | None]


def equal(a: Digests, b: Digests) -> bool:
    """Whether they are of equal tensors, as far as is known."""
    return len(a) == len(b) and all(
        x is None or y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def digest(tensor: torch.Tensor) -> torch.Tensor | None:
    """`bit_sums`; None for what is no tensor of plain memory (a distributed one, say)."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return bit_sums(tensor) if plain else None


def bit_sums(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over the tensor's bits, one of them weighted by position: int64 [2]."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().contiguous().view(_BITS[real.element_size()]).flatten()
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for place, piece in enumerate(bits.split(_PIECE)):
        values = piece.to(torch.int64)
        weights = torch.arange(len(values), device=bits.device) % 8191 + 1 + place
        sums += torch.stack([values.sum(), (values * weights).sum()])
    return sums
