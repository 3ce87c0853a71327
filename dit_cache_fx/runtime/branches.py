"""What is held for one branch of a request, and by what its calls are known."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_cache_fx.runtime.generation import Generation
from dit_cache_fx.runtime.trajectory import Trajectory
from dit_cache_fx.strategies import RuleState
from dit_cache_fx.values.identity import TensorIdentity, storage_key, version
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import inner, nbytes, settled


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that is held, and its version then: one that was changed since is not used.

    `key`: of its memory (`storage_key`).
    """

    tensor: torch.Tensor
    version: int
    key: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Held:
        """Hold a tensor; a view of a larger one is copied, so that only its own bytes are held."""
        tensor = settled(tensor)
        if sum(part.untyped_storage().nbytes() for part in inner(tensor)) > nbytes(tensor):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return Held(tensor, version(tensor), storage_key(tensor))

    def copy(self) -> Held:
        """The same values in memory of their own."""
        return Held.of(self.tensor.clone())

    def untouched(self) -> bool:
        """Whether nobody changed it in place (an inference tensor cannot tell)."""
        return version(self.tensor) == self.version

    @property
    def nbytes(self) -> int:
        return nbytes(self.tensor)


@dataclass(eq=False)
class Branch:
    """One branch of a generation: calls of one signature, context and conditioning.

    `key`, `context`: the signature and the cache contexts of its calls. `serial`: the graph that
    answered the newest. `varying`: the places of its conditioning that changed with its newest
    call. `answered`: the newest step that it answered. `called`: when it was called last, in calls
    of its session.
    """

    identity: object = field(default_factory=object)  # the same for what takes its place
    key: Hashable = None
    context: tuple[str, ...] = ()
    serial: int = 0
    generation: Generation = field(default_factory=Generation)
    conditioning: TensorIdentity = field(default_factory=lambda: TensorIdentity([]))
    trajectory: Trajectory = field(default_factory=Trajectory)
    varying: frozenset[int] = frozenset()
    answered: int = -1
    called: int = 0
    number: int = 0  # among the branches of its generation, signature and context, for reports

    held: list[Held] = field(default_factory=list)  # of all cached runs, in order
    memory: RuleState | None = None  # of the strategy's own rule
    measured: torch.Tensor | None = None  # on the CPU, where the rule has read it there
    computed: int = 0  # computed steps so far
    last_computed: int = 0  # the newest computed step
    reach: float = 0.0  # the distance to it from the one before
    prepared: tuple[TensorSpec, ...] = ()  # specs of what the host prepared for its newest graph
    shapes: Any = None  # of the masked selections that the held tensors came from

    def emptied(self) -> Branch:
        """The same branch with nothing held: its next call computes."""
        return replace(
            self, held=[], memory=None, measured=None, computed=0, last_computed=0, prepared=()
        )

    def forget(self) -> None:
        """Drop what is held."""
        self.held, self.memory, self.measured, self.computed = [], None, None, 0
