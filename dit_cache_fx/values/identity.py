"""Knowing tensors and objects again from call to call."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch

from dit_cache_fx.values.pytree import attributes


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, which cannot tell."""
    return -1 if tensor.is_inference() else tensor._version


def memory(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from others: the same for its views."""
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":  # without data there is no address
        return int(storage._cdata)
    return storage.data_ptr()


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


def alike(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors do the same: equal, or of equal parts.

    Functions are alike when their code is and what they closed over is.
    """
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    mine, others = _parts(a), _parts(b)
    if mine is None or others is None:
        return bool(a == b or (a != a and b != b))
    return len(mine) == len(others) and all(map(alike, mine, others))


def _parts(value: Any) -> list[Any] | None:
    """What a value is made of; None for what is compared as it is."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, cells, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return [list(value), list(value.values())]
    if hasattr(value, "tobytes"):  # an array
        return [value.shape, str(value.dtype), value.tobytes()]
    return [v for item in attributes(value) for v in item] or None
