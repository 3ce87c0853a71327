"""Device values that the host has read before, to avoid a second wait."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

import torch

#: the largest tensor that is read as a whole, in elements
MOST = 4096
#: the number of tensors whose values are known at a time
KNOWN = 4


class Copy(NamedTuple):
    """The values that were read from a tensor's memory. `version`: of the tensor at that time.

    Holding the memory prevents another tensor from taking its place.
    """

    memory: torch.UntypedStorage
    dtype: torch.dtype
    version: int
    values: list[float]


class HostCopies:
    """Knows device scalars that are parts of a tensor which the host has read.

    A sampler holds the timesteps of a run in one tensor and passes a part of it at each step. The
    first part waits for the device, and all others are read with it. Three kinds are never taken
    from the copy: a tensor that was changed in place since (its version shows it), an inference
    tensor (which has no version), and a scalar with memory of its own, which may be a buffer that
    the replay of a CUDA graph overwrites without a trace.
    """

    def __init__(self) -> None:
        self._known: deque[Copy] = deque(maxlen=KNOWN)
        self._lock = threading.Lock()

    def value(self, tensor: torch.Tensor) -> float | None:
        """Return the value of a one-element tensor; None if it has to be read from the device."""
        if not _is_part(tensor):
            return None
        with self._lock:
            copy = self._found(tensor) or self._read(tensor)
        return copy.values[tensor.storage_offset()]

    def _found(self, tensor: torch.Tensor) -> Copy | None:
        memory = tensor.untyped_storage()._cdata
        for copy in self._known:
            if copy.memory._cdata == memory and copy.dtype == tensor.dtype:
                return copy if copy.version == tensor._version else None
        return None

    def _read(self, tensor: torch.Tensor) -> Copy:
        """Read all of a tensor's memory. Waits for the device."""
        version, memory = tensor._version, tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory)
        copy = Copy(memory, tensor.dtype, version, whole.to("cpu", torch.float64).tolist())
        others = [c for c in self._known if c.memory._cdata != memory._cdata]
        self._known = deque([copy, *others], maxlen=KNOWN)
        return copy


def is_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the values can be read without a wait."""
    return tensor.is_cpu


def _is_part(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is one value (perhaps expanded) of a small tensor of several."""
    if type(tensor) is not torch.Tensor or tensor.is_inference() or tensor.is_complex():
        return False
    if any(s != 1 and step != 0 for s, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return False
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.numel() > 0 and 1 < elements <= MOST
