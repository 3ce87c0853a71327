"""torch's global state at a call: autocast, attention kernels, default dtype, flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dit_cache_fx._torch import attention_backends, modes
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.within import AttentionKernels, Within


class Ambient(NamedTuple):
    """The part of the state that a graph depends on: another state leads to another graph."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    cache: bool
    attention: tuple[str, ...]
    dtype: torch.dtype

    @staticmethod
    def now() -> Ambient:
        """Return the state of this thread."""
        return Ambient(
            autocast(),
            torch.is_autocast_cache_enabled(),
            attention_backends(),
            torch.get_default_dtype(),
        )

    def within(self, entry: Ambient) -> Within:
        """Return the contexts that set this state for a call in a graph with state `entry`."""
        same = self.attention == entry.attention
        kernels = None if same else AttentionKernels(self.attention, entry.attention)
        return Within(self.autocast, self.cache, kernels)


_ACCELERATOR = torch.accelerator.current_accelerator()
#: device types that may have autocast enabled
_DEVICE_TYPES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)


def autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the device types with autocast enabled, and the dtypes."""
    on = [kind for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)]
    return tuple([(kind, torch.get_autocast_dtype(kind)) for kind in on]) if on else ()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast: in a graph every cast is explicit."""
    with ExitStack() as stack:
        for kind, dtype in autocast():
            stack.enter_context(torch.autocast(kind, dtype, enabled=False))
        yield


_FLAGS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "the default dtype": torch.get_default_dtype,
        "the float32 matmul precision": torch.get_float32_matmul_precision,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
        "torch.backends.cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "torch.backends.cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "torch.backends.cudnn.enabled": lambda: torch.backends.cudnn.enabled,
        "torch.backends.cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
        "torch.backends.cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
        "torch.backends.mkldnn.enabled": lambda: torch.backends.mkldnn.enabled,
        "torch.backends.mha.set_fastpath_enabled": torch.backends.mha.get_fastpath_enabled,
        "the modes on torch's stacks": modes,
    }
)


def flags() -> dict[str, Any]:
    """Return the rest of the state, which a graph cannot set, in words."""
    return {what: _read(flag) for what, flag in _FLAGS.items()}


def _read(flag: Callable[[], Any]) -> Any:
    try:
        return flag()
    except RuntimeError:  # set by another interface (`fp32_precision`)
        return None


def refuse_flags(entry: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Refuse a model that calls module `name` in a state that a graph cannot set."""
    for what, value in now.items():
        if value != entry[what]:
            raise CaptureError(
                f"the model's forward calls module {name!r} with {what} set to {value!r}, but was "
                f"called with {entry[what]!r}: a graph cannot change that. Set it inside of the "
                "module, or around the call of the model; or make such calls between disable() "
                "and enable()"
            )
