"""Shape, dtype and device: a tensor without its values."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TensorSpec(NamedTuple):
    """What is known of a tensor that is not at hand."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.shape.numel() * self.dtype.itemsize

    def placeholder(self) -> torch.Tensor:
        """Zeros of this shape that take no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def zeros(self) -> torch.Tensor:
        """Zeros in memory of their own."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def empty(self) -> torch.Tensor:
        """Memory for the values, without any."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"
