"""One call of a cached model: whether it computes, what its graph is given, what is held after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_cache_fx.runtime.branches import Branch, Held
from dit_cache_fx.specs import TensorSpec
from dit_cache_fx.strategies import Memory, Strategy


class Step:
    """A step of one branch. `specs`: what is held of it.

    Nothing is written to the branch before `commit`: a call that raises leaves no trace.
    """

    def __init__(
        self, strategy: Strategy, branch: Branch, index: int, specs: Sequence[TensorSpec]
    ) -> None:
        self.index = index
        self._strategy = strategy
        self._branch = branch
        self._specs = specs
        self._memory: Memory | None = branch.memory
        missing = len(branch.held) != len(specs) or not all(h.untouched() for h in branch.held)
        self._forced = index == 0 or index in (strategy.no_cache_steps or ()) or missing
        self.computes = self._forced

    def anew(self) -> Step:
        """The same step of a branch that holds nothing."""
        return Step(self._strategy, Branch(), self.index, self._specs)

    # --- what a graph is given -------------------------------------------------------------------

    @property
    def _clock(self) -> list[torch.Tensor]:
        branch = self._branch
        distance = self.index - branch.last_computed if branch.computed else 0
        return [torch.tensor(float(n), dtype=torch.float64) for n in (distance, branch.computed)]

    def operands(self) -> list[torch.Tensor]:
        """For a variant: the clock, then what is held (placeholders where nothing is)."""
        held = [h.tensor for h in self._branch.held]
        return [*self._clock, *(held or [spec.placeholder() for spec in self._specs])]

    def one_graph_operands(self, memory: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """For the graph that decides by itself: flags, the rule's memory, the clock, what is held.

        Every step gives it tensors of the same strides: others would be compiled for again.
        """
        held = [h.tensor.contiguous() for h in self._branch.held]
        state: list[torch.Tensor] = []
        if memory:
            remembered = self._memory or [spec.zeros() for spec in memory]
            state = [_flag(self._memory is None), *(t.contiguous() for t in remembered)]
        held = held or [spec.zeros() for spec in self._specs]
        return [_flag(self.computes), *state, *self._clock, *held]

    def prepared(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What the host has made for the graph of this computed step; returns it."""
        self._branch.prepared = tuple(map(TensorSpec.of, tensors))
        return tensors

    def unprepared(self, first: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """In its place on a reused step, where nothing reads it. `first`: specs of the capture."""
        return [spec.empty() for spec in self._branch.prepared or first]

    # --- the strategy's own rule -----------------------------------------------------------------

    def decide(self, signal: torch.Tensor) -> None:
        """Ask the strategy's own rule. Reads one boolean from the device."""
        if self._memory is None:
            self.computes = True
            self._memory = self._strategy.begin(signal)
            return
        forced = torch.tensor(self._forced, device=signal.device)
        computes, self._memory = self._strategy.decide(signal, self._memory, forced)
        self.computes = bool(computes)

    def decided(self, computes: torch.Tensor, *memory: torch.Tensor) -> None:
        """The graph has asked the rule: its decision, on the CPU, and its new memory."""
        self.computes, self._memory = bool(computes), memory

    # --- afterwards ------------------------------------------------------------------------------

    def commit(
        self,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        kept: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """The call has succeeded: hold `kept` of a computed step. Returns what the caller may have.

        The caller may change its inputs and its outputs in place: no memory of theirs is held.
        """
        foreign = {_memory(t) for t in inputs}
        if self._memory is not None:
            self._memory = tuple(_own(Held.of(t), foreign).tensor for t in self._memory)
        self._branch.memory = self._memory
        if self.computes:
            self._hold([_own(Held.of(t), foreign) for t in kept])
        own = {_memory(h.tensor) for h in self._branch.held}
        return [t.clone() if _memory(t) in own else t for t in outputs]

    def _hold(self, held: list[Held]) -> None:
        branch = self._branch
        again = branch.computed > 0 and branch.last_computed == self.index
        branch.held = held
        branch.computed += 0 if again else 1
        branch.last_computed = self.index


def _flag(value: bool) -> torch.Tensor:
    return torch.tensor(value)


def _own(held: Held, foreign: set[int]) -> Held:
    return held.copy() if _memory(held.tensor) in foreign else held


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
