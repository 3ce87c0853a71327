"""Knowing tensors and objects again from call to call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import ref

import torch

from dit_cache_fx.values.checksum import checksum
from dit_cache_fx.values.containers import attributes
from dit_cache_fx.values.wrapped import inner, is_wrapper


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, which cannot tell."""
    if tensor.is_inference():
        return -1
    if not is_wrapper(tensor):
        return tensor._version
    inside = [version(part) for part in inner(tensor)]
    return -1 if -1 in inside else tensor._version + sum(inside)


def storage_key(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from others: the same for its views."""
    owner = next(inner(tensor), tensor) if is_wrapper(tensor) else tensor
    if owner.layout is not torch.strided:
        return id(owner)
    storage = owner.untyped_storage()
    if storage.device.type == "meta":  # without data there is no address
        return int(storage._cdata)
    return storage.data_ptr()


class TensorIdentity:
    """Tensors of a call, to be known again in a later one.

    One is the same where it is the same object, unchanged, or has the same values. Values are told
    by a checksum that is made while the tensors are there and stays on their devices: only where
    the objects differ it is compared, and the host waits. Two identities that are compared have
    the same number of tensors. An inference tensor does not tell whether it was changed in place,
    so its values count. `signed`: makes another number of a checksum, for parts of tensors.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        signed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._signed = signed
        self._refs = [(ref(t), version(t)) for t in tensors]
        self._checksums: list[torch.Tensor | None] = [None] * len(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def remember(self) -> None:
        """Make the checksums, so that equal values are known after the tensors are gone."""
        for place in range(len(self._refs)):
            self._checksum(place)

    def keep(self, other: TensorIdentity) -> None:
        """Take over the checksums of `other`, whose tensors have the same values."""
        self._checksums = [
            mine if mine is not None else theirs
            for mine, theirs in zip(self._checksums, other._checksums, strict=True)
        ]

    def other_objects(self, other: TensorIdentity) -> frozenset[int]:
        """The places whose tensors are not the same unchanged objects."""
        pairs = zip(self._refs, other._refs, strict=True)
        return frozenset([i for i, (a, b) in enumerate(pairs) if not _is_same(a, b)])

    def other_values(self, other: TensorIdentity, places: Collection[int]) -> frozenset[int]:
        """Those of `places` whose values differ, or cannot be compared. May wait for a device."""
        return frozenset(i for i in places if not self._equal(other, i))

    def shares(self, other: TensorIdentity) -> bool:
        """Whether any tensor of `other`, wherever it stands there, is one of these."""
        return bool(self._alive() & other._alive())

    def _alive(self) -> set[tuple[int, int]]:
        return {(id(t), v) for r, v in self._refs if (t := r()) is not None and version(t) == v}

    def _equal(self, other: TensorIdentity, place: int) -> bool:
        mine, theirs = self._checksum(place), other._checksums[place]
        if mine is None or theirs is None or mine.device != theirs.device:
            return False
        return bool(torch.equal(mine, theirs))

    def _checksum(self, place: int) -> torch.Tensor | None:
        if self._checksums[place] is None:
            reference, then = self._refs[place]
            tensor = reference()
            if tensor is not None and version(tensor) == then:
                own = checksum(tensor)
                self._checksums[place] = own if self._signed is None else self._signed(own)
        return self._checksums[place]


_Reference = tuple["ref[torch.Tensor]", int]


def _is_same(a: _Reference, b: _Reference) -> bool:
    tensor = a[0]()
    if tensor is None or tensor is not b[0]() or tensor.is_inference():
        return False
    return a[1] == b[1] == version(tensor)


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
