"""Rows of a batched call: split its arguments by request, and join them again.

A tensor argument has rows if its first dimension is the number of rows. A list of as many items has
rows too, if no tensor in it has. Everything else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from dit_cache_fx.values.pytree import flatten, unflatten
from dit_cache_fx.values.tensor_spec import TensorSpec


class CallRows:
    """The arguments of one call, by rows. `shared`: the names of arguments that are never split."""

    def __init__(self, arguments: dict[str, Any], count: int, shared: Collection[str]) -> None:
        self.arguments = arguments
        self.count = count
        self.shared = shared
        found = {n: _splitter(value, count) for n, value in arguments.items() if n not in shared}
        self._split = {name: split for name, split in found.items() if split is not None}

    @property
    def names(self) -> list[str]:
        """Return the arguments that have rows."""
        return list(self._split)

    def taken(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of a call with these rows, in this order."""
        return {**self.arguments, **{name: split(rows) for name, split in self._split.items()}}


_Splitter = Callable[[Sequence[int]], Any]


def _splitter(value: Any, count: int) -> _Splitter | None:
    """Return a function that takes rows out of a value; None if the value has no rows.

    A tuple is no list of rows: its parts mean different things (height and width).
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a tensor or an array
        has = len(value.shape) > 0 and value.shape[0] == count
        return partial(_picked, value) if has else None
    if type(value) is list and len(value) == count and not _has_rows(value, count):
        return lambda rows: [value[i] for i in rows]
    if type(value) not in (dict, list, tuple):
        return _splitter_of_object(value, count)
    children = list(value.values()) if isinstance(value, dict) else list(value)
    splits = [_splitter(child, count) for child in children]
    return partial(_taken, value, children, splits) if any(splits) else None


def _has_rows(value: Any, count: int) -> bool:
    """Return whether a tensor in the value has rows."""
    return any(t.ndim > 0 and t.shape[0] == count for t in flatten(value)[0])


def _splitter_of_object(value: Any, count: int) -> _Splitter | None:
    """Return a splitter for a container of another type: its tensors decide."""
    tensors, skeleton = flatten(value)
    splits = [_splitter(tensor, count) for tensor in tensors]
    if not any(splits):
        return None
    return lambda rows: unflatten(skeleton, _each(tensors, splits, rows))


def _taken(
    container: Any, children: list[Any], splits: list[_Splitter | None], rows: Sequence[int]
) -> Any:
    own = _each(children, splits, rows)
    if isinstance(container, dict):
        return dict(zip(container, own, strict=True))
    return type(container)(own)


def _each(
    values: Sequence[Any], splits: Sequence[_Splitter | None], rows: Sequence[int]
) -> list[Any]:
    return [v if s is None else s(rows) for v, s in zip(values, splits, strict=True)]


def _picked(value: Any, rows: Sequence[int]) -> Any:
    """Return rows of a tensor or an array; a view if they are adjacent."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return value if count == value.shape[0] else value[first : first + count]
    if not isinstance(value, torch.Tensor):
        return value[list(rows)]
    places = torch.tensor(rows).to(value.device, non_blocking=True)  # without a wait
    return value.index_select(0, places)


class RowPlace(NamedTuple):
    """The dimension (`dim`) in which a tensor has its rows.

    `stacked`: a single row lacks that dimension; otherwise its size there is one.
    """

    dim: int
    stacked: bool = False

    @staticmethod
    def between(one: TensorSpec, many: TensorSpec, count: int) -> RowPlace | None:
        """Find the dimension in which `many` has rows like `one`; None if there is none."""
        if (one.dtype, one.device) != (many.dtype, many.device):
            return None
        if tuple(many.shape) == (count, *one.shape):
            return RowPlace(0, stacked=True)
        pairs = list(zip(one.shape, many.shape, strict=False))
        unlike = [i for i, (a, b) in enumerate(pairs) if a != b]
        fits = len(one.shape) == len(many.shape) and len(unlike) == 1
        return RowPlace(unlike[0]) if fits and pairs[unlike[0]] == (1, count) else None

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows as views of the tensor."""
        if self.stacked:
            return list(tensor.unbind(self.dim))
        return list(tensor.split(1, self.dim))

    def joined(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a new tensor of these rows."""
        return torch.stack(list(rows)) if self.stacked else torch.cat(list(rows), self.dim)

    def in_front(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move the rows to a new first dimension."""
        if self.stacked:
            return tensor
        return tensor.movedim(self.dim, 0).unsqueeze(self.dim + 1)

    def put_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """Undo `in_front`."""
        if self.stacked:
            return tensor
        return tensor.squeeze(self.dim + 1).movedim(0, self.dim)
