"""What is held for each CFG branch, and which branch a call belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_cache_fx.runtime.generation import Generation, Moment
from dit_cache_fx.strategies import Memory
from dit_cache_fx.values.identity import Seen, version
from dit_cache_fx.values.tensor_spec import TensorSpec

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
    stable: int = 0  # how many of its conditioning tensors it had on its last two steps
    placed: bool = True  # it has a place in its step that tells it from the others
    second: bool = False  # it may be another one, called again in the generation's first step
    held: list[Held] = field(default_factory=list)  # of all cached runs, in order
    memory: Memory | None = None  # of the strategy's own rule
    computed: int = 0  # computed steps so far
    last_computed: int = 0  # the newest computed step
    reach: float = 0.0  # the distance to it from the one before
    prepared: tuple[TensorSpec, ...] = ()  # specs of what the host prepared for its newest graph
    shapes: Any = None  # of the masked selections that the held tensors came from

    def forget(self) -> None:
        """Drop what is held: the next call computes."""
        self.held, self.memory, self.computed = [], None, 0


@dataclass
class Session:
    """What is held for one input signature and cache context, in the generation under way.

    `serial`: of the signature's graph. `context`: the name of the cache context, if in one: its
    calls are of one branch as a rule.
    """

    serial: int = 0
    context: str | None = None
    generation: Generation | None = None
    moment: Moment | None = None  # of its newest call
    branches: list[Branch] = field(default_factory=list)
    called: list[Branch] = field(default_factory=list)  # in the current step
    doubted: list[Branch] = field(default_factory=list)  # in the current step, see `_certain`
    crowded: Moment | None = None  # the newest that had more calls than branches are kept

    def enter(self, generation: Generation, moment: Moment) -> bool:
        """Move to `moment`; nothing is held of another generation, or behind too many calls.

        Returns whether too many calls made it drop what a step under way held.
        """
        if generation is not self.generation or moment != self.moment:
            self._leave()
        if generation is not self.generation:
            self.crowded = None
        crowded = len(self.called) >= MAX_BRANCHES
        if crowded:  # which of the step's calls are left depends on their number
            self.crowded = moment
        if generation is not self.generation or crowded:
            self.branches, self.called, self.doubted = [], [], []
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
        most = max(shared, default=0)
        known = [b for b, n in zip(free, shared, strict=True) if n == most > 0]
        strangers = [b for b in free if b.placed and (not b.recognised or not len(conditioning))]
        if known:
            branch = self._certain(known)
            if most < branch.stable:  # a part of its conditioning is another one's
                branch.forget()
            branch.recognised = True
        elif strangers:
            branch = self._certain(strangers)
        else:
            branch = self._place(free)
        branch.second = branch.second or (self._starting() and self._again(conditioning))
        branch.conditioning, branch.stable = conditioning, most
        branch.placed = self.crowded != self.moment
        self.called.append(branch)
        return branch

    def _certain(self, candidates: list[Branch]) -> Branch:
        """The first of several that a call may belong to; it holds nothing where that is a guess.

        After two like calls in a generation's first step, another one can go on from either: they
        may be samples side by side, or the first is left from a generation that ended right there
        (a warm-up, an interrupted one). How many calls this step has would tell, but too late.
        """
        branch = candidates[0]
        if len(candidates) > 1 and any(b.second for b in candidates):
            branch.forget()
            self.doubted = candidates
        return branch

    def _leave(self) -> None:
        """The step is over: what it might have called and did not is of another generation."""
        uncalled = [b for b in self.doubted if not any(b is c for c in self.called)]
        self.branches = [b for b in self.branches if not any(b is u for u in uncalled)]
        if not self._starting():
            for branch in self.called:
                branch.second = False
        self.called, self.doubted = [], []

    def _starting(self) -> bool:
        return self.moment is not None and self.moment.index == 0

    def _again(self, conditioning: Seen) -> bool:
        """Whether a call of the step is like one that it has had."""
        return any(
            self.context is not None or b.conditioning.shared_with(conditioning)
            for b in self.called
        )

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
