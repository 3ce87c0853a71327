"""What a tiny model offers to the test of which classes the library captures and caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class SupportCase:
    """One tiny transformer, its `forward` called as the diffusers pipeline of its class does.

    `build()` gives the model in eval mode with redrawn weights. `inputs(timestep, *, seed=0)`
    gives the keyword arguments of `forward`: `seed` redraws only the noisy sample, conditioning is
    made afresh with equal values. `timesteps(n)` gives `n` timesteps in the model's units.
    `timestep` names the argument that carries them where the library has to be told.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    timesteps: Callable[[int], list[float]]
    timestep: str | None = None
