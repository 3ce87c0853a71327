"""What is held for each CFG branch, and which branch a call belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_cache_fx.identity import Seen, version
from dit_cache_fx.runtime.steps import Generation, Moment
from dit_cache_fx.specs import TensorSpec
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

    def copy(self) -> Held:
        """The same values in memory of their own."""
        return Held.of(self.tensor.clone())

    def untouched(self) -> bool:
        """Whether nobody changed it in place (an inference tensor cannot tell)."""
        return version(self.tensor) == self.version

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass
class Branch:
    """What is held for one branch of a generation."""

    conditioning: Seen = field(default_factory=lambda: Seen([]))
    recognised: bool = False  # its conditioning was seen again on a later step
    placed: bool = True  # it has a place in its step that tells it from the others
    held: list[Held] = field(default_factory=list)  # of all cached runs, in order
    memory: Memory | None = None  # of the strategy's own rule
    computed: int = 0  # computed steps so far
    last_computed: int = 0  # the newest computed step
    prepared: tuple[TensorSpec, ...] = ()  # specs of what the host prepared for its newest graph
    shapes: Any = None  # of the masked selections that the held tensors came from

    def forget(self) -> None:
        """Drop what is held: the next call computes."""
        self.held, self.memory, self.computed = [], None, 0


@dataclass
class Session:
    """What is held for one input signature and cache context, in the generation under way.

    `serial`: of the signature's graph. `context`: the name of the cache context, if in one.
    """

    serial: int = 0
    context: str | None = None
    generation: Generation | None = None
    moment: Moment | None = None  # of its newest call
    branches: list[Branch] = field(default_factory=list)
    called: list[Branch] = field(default_factory=list)  # in the current step
    crowded: Moment | None = None  # the newest that had more calls than branches are kept

    def enter(self, generation: Generation, moment: Moment) -> bool:
        """Move to `moment`; nothing is held of another generation, or behind too many calls.

        Returns whether too many calls made it drop what a step under way held.
        """
        if generation is not self.generation or moment != self.moment:
            self.called = []
        if generation is not self.generation:
            self.crowded = None
        crowded = len(self.called) >= MAX_BRANCHES
        if crowded:  # which of the step's calls are left depends on their number
            self.crowded = moment
        if generation is not self.generation or crowded:
            self.branches, self.called = [], []
        self.generation, self.moment = generation, moment
        generation.moment = moment
        return crowded and moment.index > 0

    def branch_of(self, conditioning: Seen) -> Branch:
        """The branch of a call: known by its conditioning, else by its place in the step.

        Conditioning that is not known, where that of every free branch is, means a branch of its
        own: a new one, or another prompt in the place of one whose conditioning is gone.
        """
        free = [b for b in self.branches if not any(b is c for c in self.called)]
        shared = [b.conditioning.shared_with(conditioning) for b in free]
        strangers = [b for b in free if b.placed and (not b.recognised or not len(conditioning))]
        if shared and max(shared) > 0:
            branch = free[shared.index(max(shared))]
            branch.recognised = True
        elif strangers:
            branch = strangers[0]
        else:
            branch = self._place(free)
        branch.conditioning = conditioning
        branch.placed = self.crowded != self.moment
        self.called.append(branch)
        return branch

    def _place(self, free: list[Branch]) -> Branch:
        """A branch that holds nothing."""
        left = [b for b in free if b.conditioning.gone()]
        if not left and len(self.branches) < MAX_BRANCHES:
            self.branches.append(Branch())
            return self.branches[-1]
        branch = (left or free)[0]
        branch.forget()
        branch.recognised = False
        return branch

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put everything back to where it was when the call raises."""
        own, generation = dict(vars(self)), self.generation
        own["branches"], own["called"] = list(self.branches), list(self.called)
        moment = generation.moment if generation is not None else None
        branches = [(b, dict(vars(b))) for b in self.branches]
        try:
            yield
        except BaseException:
            vars(self).update(own)
            for branch, fields in branches:
                vars(branch).update(fields)
            if generation is not None and moment is not None:
                generation.moment = moment
            raise
