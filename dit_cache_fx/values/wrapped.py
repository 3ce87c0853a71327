"""Tensors that wrap others: results of collectives, DTensors, quantised tensors.

Such a tensor has no memory of its own. Its memory, bytes and bits are those of the tensors inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: types with their own memory that wrap nothing: most tensors of most calls
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor; wait for the result of a collective that is still under way."""
    if type(tensor) in PLAIN_TENSORS:
        return tensor
    wait: Any = getattr(tensor, "trigger_wait", None)
    if wait is None:
        return tensor
    arrived: torch.Tensor = wait()
    return arrived


def inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors with memory that a tensor consists of: itself, unless it is a wrapper."""
    tensor = settled(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a mesh is none
            yield from inner(part)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether the tensor's memory belongs to other tensors."""
    return type(tensor) not in PLAIN_TENSORS and is_traceable_wrapper_subclass(tensor)


def nbytes(tensor: torch.Tensor) -> int:
    """Return the size of the values in bytes; for a DTensor, those of this process."""
    return sum(part.numel() * part.element_size() for part in inner(tensor))


def is_distributed(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is one of several processes (a DTensor)."""
    return (
        type(tensor) not in PLAIN_TENSORS
        and hasattr(tensor, "device_mesh")
        and hasattr(tensor, "to_local")
    )


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor; all of it if each process holds a summand."""
    if type(tensor) in PLAIN_TENSORS:
        return tensor
    if not is_distributed(tensor):
        return settled(tensor)
    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        return settled(spread.full_tensor())
    part: torch.Tensor = spread.to_local()
    return settled(part)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's full value; any other tensor as it is."""
    if type(tensor) in PLAIN_TENSORS:
        return tensor
    spread: Any = tensor
    return settled(spread.full_tensor() if is_distributed(tensor) else tensor)


class Layout(NamedTuple):
    """The layout of a DTensor: its mesh, and the placement in each mesh dimension."""

    mesh: Any
    placements: tuple[Any, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout | None:
        """Return the layout of a DTensor; None for any other tensor."""
        if not is_distributed(tensor):
            return None
        spread: Any = tensor
        return Layout(spread.device_mesh, tuple(spread.placements))


def laid_out(tensor: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    """Return a DTensor from a tensor that all processes have, without communication."""
    if layout is None:
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [Replicate() if p.is_partial() else p for p in layout.placements]
    return distribute_tensor(tensor, layout.mesh, placements, src_data_rank=None)
