"""Knowing tensors again from call to call without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, which cannot tell."""
    return -1 if tensor.is_inference() else tensor._version


class Seen:
    """Tensors of a call. One is the same again when it is the same object, unchanged.

    Inference tensors cannot tell whether they were changed. `certain` leaves them out; else the
    object alone counts.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], certain: bool = False) -> None:
        self._refs = [(ref(t), version(t)) for t in tensors if not (certain and t.is_inference())]

    def __len__(self) -> int:
        return len(self._refs)

    def shared_with(self, other: Seen) -> int:
        """How many tensors both have."""
        return len(self._alive() & other._alive())

    def _alive(self) -> set[tuple[int, int]]:
        return {(id(t), v) for r, v in self._refs if (t := r()) is not None and version(t) == v}

    def gone(self) -> bool:
        """Whether none of them is there any more as it was."""
        return not self._alive()
