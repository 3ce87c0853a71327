"""The contexts that the model's forward enters around a module's call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class AttentionKernels(NamedTuple):
    """Names of the enabled `SDPBackend`s inside and outside of a context, by priority."""

    inside: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Within:
    """The autocast and attention state of a module's call; a graph itself runs without autocast.

    `autocast`: device types with autocast enabled, and their dtypes. `attention`: None to keep the
    kernels of the graph's caller.
    """

    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    cache: bool = True  # whether autocast keeps the weights that it has cast
    attention: AttentionKernels | None = None

    def __bool__(self) -> bool:
        return bool(self.autocast) or self.attention is not None

    def __str__(self) -> str:
        """Return the contexts as Python source that needs only the name `torch`."""
        contexts = [
            f"torch.autocast({device!r}, {dtype}, cache_enabled={self.cache})"
            for device, dtype in self.autocast
        ]
        if self.attention is not None:
            names = ", ".join(f"torch.nn.attention.SDPBackend.{n}" for n in self.attention.inside)
            contexts.append(f"torch.nn.attention.sdpa_kernel([{names}], set_priority=True)")
        return ", ".join(contexts)
