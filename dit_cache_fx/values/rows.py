"""Rows: what of a call belongs to one request, taken out of it and put together again.

A tensor among the arguments has rows where its first dimension is as long as there are rows. So has
a list or tuple of as many items, where nothing in it has. All else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from dit_cache_fx.values.pytree import flatten, unflatten
from dit_cache_fx.values.tensor_spec import TensorSpec


class CallRows:
    """The arguments of one call, by rows. `shared`: names of those that are never split."""

    def __init__(self, arguments: dict[str, Any], count: int, shared: Collection[str]) -> None:
        self.arguments = arguments
        self.count = count
        self.shared = shared
        found = {n: _splitter(value, count) for n, value in arguments.items() if n not in shared}
        self._split = {name: split for name, split in found.items() if split is not None}

    @property
    def names(self) -> list[str]:
        """The arguments that have rows."""
        return list(self._split)

    def taken(self, rows: Sequence[int]) -> dict[str, Any]:
        """The arguments of a call with these rows, in this order."""
        return {**self.arguments, **{name: split(rows) for name, split in self._split.items()}}


_Splitter = Callable[[Sequence[int]], Any]


def _splitter(value: Any, count: int) -> _Splitter | None:
    """How rows are taken out of a value; None where it has none."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a tensor, or numpy's
        has = len(value.shape) > 0 and value.shape[0] == count
        return (lambda rows: _picked(value, rows)) if has else None
    if type(value) not in (dict, list, tuple):
        return _splitter_of_object(value, count)
    children = list(value.values()) if isinstance(value, dict) else list(value)
    splits = [_splitter(child, count) for child in children]
    if any(splits):
        return lambda rows: _like(
            value,
            [
                child if split is None else split(rows)
                for child, split in zip(children, splits, strict=True)
            ],
        )
    if isinstance(value, dict) or len(value) != count:
        return None
    return lambda rows: type(value)(value[i] for i in rows)


def _splitter_of_object(value: Any, count: int) -> _Splitter | None:
    """The same for a container of another type: by its tensors."""
    tensors, skeleton = flatten(value)
    splits = [_splitter(tensor, count) for tensor in tensors]
    if not any(splits):
        return None
    return lambda rows: unflatten(
        skeleton,
        [t if s is None else s(rows) for t, s in zip(tensors, splits, strict=True)],
    )


def _like(container: Any, children: list[Any]) -> Any:
    if isinstance(container, dict):
        return dict(zip(container, children, strict=True))
    return type(container)(children)


def _picked(value: Any, rows: Sequence[int]) -> Any:
    """Rows of a tensor or an array; without a copy where they are next to each other."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return value if count == value.shape[0] else value[first : first + count]
    if not isinstance(value, torch.Tensor):
        return value[list(rows)]
    return value.index_select(0, torch.tensor(rows, device=value.device))


class RowPlace(NamedTuple):
    """Where a tensor has its rows. `dim`: the dimension.

    `stacked`: one row is a tensor without that dimension; else it is of size one there.
    """

    dim: int
    stacked: bool = False

    @staticmethod
    def between(one: TensorSpec, many: TensorSpec, count: int) -> RowPlace | None:
        """Where `many` has the rows of which `one` is a single one; None where it has none."""
        if (one.dtype, one.device) != (many.dtype, many.device):
            return None
        if tuple(many.shape) == (count, *one.shape):
            return RowPlace(0, stacked=True)
        pairs = list(zip(one.shape, many.shape, strict=False))
        unlike = [i for i, (a, b) in enumerate(pairs) if a != b]
        fits = len(one.shape) == len(many.shape) and len(unlike) == 1
        return RowPlace(unlike[0]) if fits and pairs[unlike[0]] == (1, count) else None

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The rows, views of the tensor."""
        if self.stacked:
            return list(tensor.unbind(self.dim))
        return list(tensor.split(1, self.dim))

    def joined(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """A tensor of these rows, in memory of its own."""
        return torch.stack(list(rows)) if self.stacked else torch.cat(list(rows), self.dim)

    def in_front(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows as a new first dimension."""
        if self.stacked:
            return tensor
        return tensor.movedim(self.dim, 0).unsqueeze(self.dim + 1)

    def put_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `in_front` was given."""
        if self.stacked:
            return tensor
        return tensor.squeeze(self.dim + 1).movedim(0, self.dim)
