"""One call of a cached model: decides, runs each cached run's side, and notes what to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dit_cache_fx.runtime.branches import Branch, Held
from dit_cache_fx.strategies import Memory, Strategy

Side = Callable[..., Sequence[torch.Tensor]]


class Step:
    """Passed to the lowered graph, which calls `decide` and `run`.

    Nothing is written to the branch before `commit`: a call that raises leaves no trace.
    """

    def __init__(
        self, strategy: Strategy, branch: Branch, index: int, runs: Mapping[int, HeldSpec]
    ) -> None:
        self.index = index
        self._strategy = strategy
        self._branch = branch
        self._runs = runs
        self._new: dict[int, list[Held]] = {}
        self._memory: Memory | None = branch.memory
        held_all = all(i in branch.held and _untouched(branch.held[i]) for i in runs)
        self._forced = index == 0 or index in (strategy.no_cache_steps or ()) or not held_all
        self.computes = self._forced
        distance = index - branch.last_computed if branch.computed else 0
        self._clock = [
            torch.tensor(float(n), dtype=torch.float64) for n in (distance, branch.computed)
        ]

    def decide(self, signal: torch.Tensor) -> None:
        """Ask the strategy's own rule. Reads one boolean from the device."""
        if self._memory is None:
            self.computes = True
            self._memory = self._strategy.begin(signal)
            return
        forced = torch.tensor(self._forced, device=signal.device)
        computes, self._memory = self._strategy.decide(signal, self._memory, forced)
        self.computes = bool(computes)

    def run(
        self,
        index: int,
        compute: Side,
        reuse: Side,
        starts: Sequence[torch.Tensor],
        operands: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """The values of cached run `index`."""
        held: Sequence[torch.Tensor | None] = [h.tensor for h in self._branch.held.get(index, ())]
        if not self.computes:
            return reuse(*held, *self._clock, *starts)
        spec = self._runs[index]
        results = compute(*(held or spec.nothing()), *self._clock, *starts, *operands)
        self._new[index] = [Held.of(t) for t in results[spec.values :]]
        return results[: spec.values]

    def commit(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The call has succeeded: hold what it computed. Returns what the caller may have.

        The caller may change its inputs and its outputs in place: no memory of theirs is held.
        """
        foreign = {_memory(t) for t in inputs}
        for run, held in self._new.items():
            self._new[run] = [_own(h, foreign) for h in held]
        if self._memory is not None:
            self._memory = tuple(_own(Held.of(t), foreign).tensor for t in self._memory)
        self._write()
        own = {_memory(h.tensor) for held in self._branch.held.values() for h in held}
        return [t.clone() if _memory(t) in own else t for t in outputs]

    def _write(self) -> None:
        branch = self._branch
        branch.memory = self._memory
        if not self.computes:
            return
        again = branch.computed > 0 and branch.last_computed == self.index
        branch.held = self._new
        branch.computed += 0 if again else 1
        branch.last_computed = self.index


@dataclass(frozen=True)
class HeldSpec:
    """What one cached run holds: `values` values, each in `slots` tensors of its shape."""

    values: int
    shapes: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    slots: int

    def nothing(self) -> list[torch.Tensor]:
        """Zeros in the place of what is not held yet; they take no memory."""
        return [
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in self.shapes
            for _ in range(self.slots)
        ]


def _own(held: Held, foreign: set[int]) -> Held:
    return held.copy() if _memory(held.tensor) in foreign else held


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _untouched(held: Sequence[Held]) -> bool:
    return all(h.untouched() for h in held)
