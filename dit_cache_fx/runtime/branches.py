"""What is held for each CFG branch, and which branch a call belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dit_cache_fx.identity import Seen, version
from dit_cache_fx.runtime.steps import Moment
from dit_cache_fx.strategies import Memory

#: more calls than this with one timestep are not the branches of one step
MAX_BRANCHES = 8


@dataclass(frozen=True)
class Held:
    """A tensor that is held, and its version then: one that was changed since is not used."""

    tensor: torch.Tensor
    version: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Held:
        """Hold a tensor; a view of a larger one is copied, so that only its own bytes are held."""
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return Held(tensor, version(tensor))

    def untouched(self) -> bool:
        """Whether nobody changed it in place (an inference tensor cannot tell)."""
        return version(self.tensor) == self.version

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass
class Branch:
    """What is held for one branch of a generation."""

    conditioning: Seen
    recognised: bool = False  # its conditioning was seen again on a later step
    held: dict[int, list[Held]] = field(default_factory=dict)  # by cached run
    memory: Memory | None = None  # of the strategy's own rule
    computed: int = 0  # computed steps so far
    last_computed: int = 0  # the newest computed step
    shapes: Any = None  # of the masked selections that the held tensors came from

    def forget(self) -> None:
        """Drop what is held: the next call computes."""
        self.held, self.memory, self.computed = {}, None, 0


@dataclass
class Session:
    """The generation that is under way for one input signature and cache context."""

    moment: Moment | None = None
    branches: list[Branch] = field(default_factory=list)
    called: list[Branch] = field(default_factory=list)  # in the current step

    def enter(self, moment: Moment, fresh: bool) -> None:
        """Move to `moment`; a fresh generation holds nothing."""
        if fresh:
            self.branches = []
        if fresh or moment != self.moment:
            self.called = []
        self.moment = moment

    def full(self) -> bool:
        """Whether the current step has had a call for every branch that there can be."""
        return len(self.called) >= MAX_BRANCHES

    def branch_of(self, conditioning: Seen) -> Branch:
        """The branch of a call: known by its conditioning, else by its place in the step.

        A branch whose conditioning was recognised before and now is not has another prompt: it
        keeps its place but holds nothing.
        """
        free = [b for b in self.branches if not any(b is c for c in self.called)]
        shared = [b.conditioning.shared_with(conditioning) for b in free]
        if shared and max(shared) > 0:
            branch = free[shared.index(max(shared))]
            branch.recognised = True
        elif free:
            branch = free[0]
            if branch.recognised and len(conditioning):
                branch.forget()
                branch.recognised = False
        else:
            branch = Branch(conditioning)
            self.branches.append(branch)
        branch.conditioning = conditioning
        self.called.append(branch)
        return branch
