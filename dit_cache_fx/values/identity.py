"""Recognise tensors and objects from call to call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import ref

import torch

from dit_cache_fx.values.checksum import checksum
from dit_cache_fx.values.containers import attributes
from dit_cache_fx.values.wrapped import PLAIN_TENSORS, inner, is_wrapper

#: the version of a tensor whose in-place changes are unknown
UNCOUNTED = -1


def version(tensor: torch.Tensor) -> int:
    """Return the number of in-place changes; `UNCOUNTED` for an inference tensor."""
    if tensor.is_inference():
        return UNCOUNTED
    if type(tensor) in PLAIN_TENSORS or not is_wrapper(tensor):
        return tensor._version
    inside = [version(part) for part in inner(tensor)]
    return UNCOUNTED if UNCOUNTED in inside else tensor._version + sum(inside)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key of the tensor's memory: the same for all its views."""
    owner = next(inner(tensor), tensor) if is_wrapper(tensor) else tensor
    if owner.layout is not torch.strided:
        return id(owner)
    storage = owner.untyped_storage()
    if storage.device.type == "meta":  # without data there is no address
        return int(storage._cdata)
    return storage.data_ptr()


class TensorIdentity:
    """The tensors of a call, to recognise them in a later one.

    A tensor is the same if it is the same unchanged object, or has the same values. Values are
    compared by a checksum that is computed while the tensors exist and stays on their devices. The
    host reads it, and waits, only where the objects differ. Two identities that are compared have
    the same number of tensors. An inference tensor does not count its in-place changes, so its
    values decide. `signed`: maps a checksum to another number, for parts of tensors.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        signed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._signed = signed
        self._refs = [ref(t) for t in tensors]
        self._versions = [version(t) for t in tensors]
        self._checksums: list[torch.Tensor | None] = [None] * len(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def remember(self) -> None:
        """Compute the checksums, so that equal values are recognised after the tensors are gone."""
        for place in range(len(self._refs)):
            self._checksum(place)

    def keep(self, other: TensorIdentity) -> None:
        """Take over the checksums of `other`, whose tensors have the same values."""
        self._checksums = [
            mine if mine is not None else theirs
            for mine, theirs in zip(self._checksums, other._checksums, strict=True)
        ]

    def other_objects(self, other: TensorIdentity) -> frozenset[int]:
        """Return the positions whose tensors are not the same unchanged objects.

        These tensors are those of the call under way: they exist, in these versions. An object has
        one weak reference, which all holders share.
        """
        pairs = zip(self._refs, other._refs, self._versions, other._versions, strict=True)
        return frozenset(
            [i for i, (a, b, v, w) in enumerate(pairs) if a is not b or v != w or v == UNCOUNTED]
        )

    def other_values(self, other: TensorIdentity, places: Collection[int]) -> frozenset[int]:
        """Return those of `places` with other or unknown values. May wait for a device."""
        return frozenset(i for i in places if not self._equal(other, i))

    def shares(self, other: TensorIdentity) -> bool:
        """Return whether any tensor of `other`, at any position, is one of these."""
        return bool(self._alive() & other._alive())

    def _alive(self) -> set[tuple[int, int]]:
        pairs = zip(self._refs, self._versions, strict=True)
        return {(id(t), v) for r, v in pairs if (t := r()) is not None and version(t) == v}

    def _equal(self, other: TensorIdentity, place: int) -> bool:
        mine, theirs = self._checksum(place), other._checksums[place]
        if mine is None or theirs is None or mine.device != theirs.device:
            return False
        return bool(torch.equal(mine, theirs))

    def _checksum(self, place: int) -> torch.Tensor | None:
        if self._checksums[place] is None:
            tensor = self._refs[place]()
            if tensor is not None and version(tensor) == self._versions[place]:
                own = checksum(tensor)
                self._checksums[place] = own if self._signed is None else self._signed(own)
        return self._checksums[place]


def alike(a: Any, b: Any) -> bool:
    """Return whether two values that are no tensors behave the same: equal, or of equal parts.

    Functions are alike if their code and the values that they close over are.
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
    """Return the parts of a value; None if it is compared as a whole."""
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
