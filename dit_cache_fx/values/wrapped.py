"""Tensors that wrap others: results of collectives, shards of distributed tensors, quantised ones.

Such a tensor has no memory of its own. Whoever asks for its memory, its bytes or its bits gets
those of the tensors inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: types that have memory of their own and wrap nothing: most tensors of most calls
_SIMPLE = frozenset({torch.Tensor, torch.nn.Parameter})


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; that of a collective which may be under way once it has arrived."""
    if type(tensor) in _SIMPLE:
        return tensor
    wait: Any = getattr(tensor, "trigger_wait", None)
    if wait is None:
        return tensor
    arrived: torch.Tensor = wait()
    return arrived


def inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory that a tensor is made of: itself, if it is no wrapper."""
    tensor = settled(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a mesh is none
            yield from inner(part)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether its memory is that of others."""
    return type(tensor) not in _SIMPLE and is_traceable_wrapper_subclass(tensor)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of its values; of a distributed tensor those of this process."""
    return sum(part.numel() * part.element_size() for part in inner(tensor))


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is one tensor of several processes (a DTensor)."""
    return (
        type(tensor) not in _SIMPLE
        and hasattr(tensor, "device_mesh")
        and hasattr(tensor, "to_local")
    )


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor; all of it where each process has a summand."""
    if type(tensor) in _SIMPLE:
        return tensor
    if not is_distributed(tensor):
        return settled(tensor)
    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        return settled(spread.full_tensor())
    part: torch.Tensor = spread.to_local()
    return settled(part)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a distributed tensor; any other tensor itself."""
    spread: Any = tensor
    return settled(spread.full_tensor() if is_distributed(tensor) else tensor)


class Layout(NamedTuple):
    """How a tensor is spread over processes: their mesh, and what each dimension of it does."""

    mesh: Any
    placements: tuple[Any, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout | None:
        """That of a distributed tensor; None for any other."""
        if not is_distributed(tensor):
            return None
        spread: Any = tensor
        return Layout(spread.device_mesh, tuple(spread.placements))


def laid_out(tensor: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    """A tensor that all processes have, as a distributed one; nothing is sent."""
    if layout is None:
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [Replicate() if p.is_partial() else p for p in layout.placements]
    return distribute_tensor(tensor, layout.mesh, placements, src_data_rank=None)
