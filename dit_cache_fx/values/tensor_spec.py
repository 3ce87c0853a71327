"""Shape, dtype and device of a tensor, without its values."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TensorSpec(NamedTuple):
    """Shape, dtype and device of a tensor that is not at hand."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of a tensor."""
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def placeholder(self) -> torch.Tensor:
        """Return zeros of this shape that take no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def without_data(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def zeros(self) -> torch.Tensor:
        """Allocate zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def empty(self) -> torch.Tensor:
        """Allocate memory without initialising it."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"
