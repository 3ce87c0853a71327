"""Values on a device that the host knows already."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

import torch

#: most elements of a tensor that is read as a whole
MOST = 4096
#: of how many tensors the values are known at a time
KNOWN = 4


class Copy(NamedTuple):
    """What was read of a tensor's memory. `version`: of the tensor then.

    The memory is held, so that no other tensor can take its place.
    """

    memory: torch.UntypedStorage
    dtype: torch.dtype
    version: int
    values: list[float]


class HostCopies:
    """Knows single values on a device that are parts of a tensor which was read before.

    A sampler holds the timesteps of a run in one tensor, and gives a part of it to each step. The
    first one is waited for, and all are read with it. In doubt nothing is known: of a tensor that
    was changed in place since (its version tells), of an inference tensor (which has none), and of
    a value that has its memory alone, which may be a buffer that is written for each step, by the
    replay of a CUDA graph even, which leaves no trace.
    """

    def __init__(self) -> None:
        self._known: deque[Copy] = deque(maxlen=KNOWN)
        self._lock = threading.Lock()

    def value(self, tensor: torch.Tensor) -> float | None:
        """The one value of a tensor; None where it has to be read by itself."""
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
    """Whether its values can be read without a wait."""
    return tensor.is_cpu


def _is_part(tensor: torch.Tensor) -> bool:
    """Whether it is one value, perhaps many times, of a small tensor of several."""
    if type(tensor) is not torch.Tensor or tensor.is_inference() or tensor.is_complex():
        return False
    if any(s != 1 and step != 0 for s, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return False
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.numel() > 0 and 1 < elements <= MOST
