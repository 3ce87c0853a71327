"""Determine steps and generations from the timestep inside a graph.

The same rules as in `runtime.tracking.generation` on the host, as arithmetic on a few numbers that
each call passes to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ClockState(NamedTuple):
    """The position in a generation; tensors of no dimensions, float64.

    `started`: whether there was a call. `value`: the newest timestep. `direction`: +1 or -1 after
    the first move, before it 0. `step`: the step, counted from the generation's first. `computed`:
    computed steps so far. `last`: the newest computed step. `reach`: its distance from the computed
    step before.
    """

    started: torch.Tensor
    value: torch.Tensor
    direction: torch.Tensor
    step: torch.Tensor
    computed: torch.Tensor
    last: torch.Tensor
    reach: torch.Tensor

    @staticmethod
    def unpack(packed: torch.Tensor) -> ClockState:
        """Read the state from one tensor of shape [7]."""
        return ClockState(*packed.unbind())

    def pack(self) -> torch.Tensor:
        """Return the state as one tensor of shape [7]."""
        return torch.stack(list(self))

    def advanced(self, value: torch.Tensor, known: torch.Tensor) -> ClockState:
        """Advance to this timestep. `known`: the conditioning is that of the call before.

        A timestep that moves on is the next step. One that moves back against the direction so far
        is a new generation's first step. The same value is also the next step (timesteps that round
        to one value, samplers that evaluate one twice), unless the conditioning differs: then it is
        the same step, with nothing computed so far.
        """
        moved = torch.sign(value - self.value)
        running = self.started > 0
        same = running & (moved == 0)
        on = running & (moved != 0) & ((self.direction == 0) | (moved == self.direction))
        step = torch.where(same & ~known, self.step, torch.where(same | on, self.step + 1, 0.0))
        direction = torch.where(same, self.direction, torch.where(on, moved, 0.0))
        computed = torch.where((same | on) & known, self.computed, 0.0)
        started = torch.ones_like(self.started)
        return ClockState(started, value, direction, step, computed, self.last, self.reach)

    @property
    def distance(self) -> torch.Tensor:
        """The steps since the last computed one; 0 before the first."""
        return torch.where(self.computed > 0, self.step - self.last, 0.0)

    def after(self, computes: torch.Tensor, distance: torch.Tensor) -> ClockState:
        """Advance past the call's step, at `distance` from the last computed one.

        A second evaluation of a step counts once.
        """
        counts = computes & ~((self.computed > 0) & (self.last == self.step))
        return self._replace(
            computed=torch.where(counts, self.computed + 1, self.computed),
            last=torch.where(computes, self.step, self.last),
            reach=torch.where(counts, distance, self.reach),
        )
