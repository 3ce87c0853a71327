"""The state of one branch of a request, and the data that identifies its calls."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_cache_fx.runtime.tracking.generation import Generation
from dit_cache_fx.runtime.tracking.trajectory import Trajectory
from dit_cache_fx.strategies import RuleState
from dit_cache_fx.values.identity import TensorIdentity, storage_key, version
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import inner, nbytes, settled


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """A cached tensor, with its version: it is not used if it changed in place since.

    `key`: of its memory (`storage_key`).
    """

    tensor: torch.Tensor
    version: int
    key: int

    @staticmethod
    def of(tensor: torch.Tensor) -> CachedTensor:
        """Hold a tensor; a view of a larger one is copied, so that only its own bytes are held."""
        tensor = settled(tensor)
        if sum(part.untyped_storage().nbytes() for part in inner(tensor)) > nbytes(tensor):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return CachedTensor(tensor, version(tensor), storage_key(tensor))

    def copy(self) -> CachedTensor:
        """Return the same values in memory of their own."""
        return CachedTensor.of(self.tensor.clone())

    def untouched(self) -> bool:
        """Return whether nobody changed it in place (unknown for an inference tensor)."""
        return version(self.tensor) == self.version

    @property
    def nbytes(self) -> int:
        return nbytes(self.tensor)


@dataclass(eq=False)
class Branch:
    """One branch of a generation: calls of one signature, context and conditioning.

    `key`, `context`: the signature and the cache contexts of its calls. `serial`: the graph of the
    newest call. `varying`: the positions of its conditioning that changed in its newest call.
    `answered`: its newest step. `called`: the time of its newest call, counted in calls of its
    session.
    """

    identity: object = field(default_factory=object)  # kept by the branch that replaces this one
    key: Hashable = None
    context: tuple[str, ...] = ()
    serial: int = 0
    generation: Generation = field(default_factory=Generation)
    conditioning: TensorIdentity = field(default_factory=lambda: TensorIdentity([]))
    trajectory: Trajectory = field(default_factory=Trajectory)
    varying: frozenset[int] = frozenset()
    answered: int = -1
    called: int = 0
    number: int = 0  # its index in its generation, signature and context, for reports

    cached: list[CachedTensor] = field(default_factory=list)  # of all cached runs, in order
    rule_state: RuleState | None = None  # of the strategy's rule
    measured: torch.Tensor | None = None  # on the CPU, once the rule has read it
    computed: int = 0  # computed steps so far
    last_computed: int = 0  # the newest computed step
    reach: float = 0.0  # the distance of the last two computed steps
    #: kind of step -> specs of its preamble's newest results
    prepared: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    shapes: Any = None  # of the masked selections in the cached tensors

    def emptied(self) -> Branch:
        """Return the same branch with nothing held: its next call computes."""
        nothing: Any = {"cached": [], "rule_state": None, "measured": None, "prepared": {}}
        return replace(self, computed=0, last_computed=0, **nothing)

    def forget(self) -> None:
        """Drop the cached tensors."""
        self.cached, self.rule_state, self.measured, self.computed = [], None, None, 0
