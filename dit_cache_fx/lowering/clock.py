"""Steps and generations told from the timestep inside a graph.

The same rules as `runtime.generation` has for the host, as arithmetic on a few numbers that are
carried from call to call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ClockState(NamedTuple):
    """Where a generation stands; tensors of no dimensions, float64.

    `started`: whether there was a call. `value`: the newest timestep. `direction`: +1 or -1 once it
    has moved, else 0. `step`: the step, counted from the generation's first. `computed`: computed
    steps so far. `last`: the newest computed step. `reach`: the distance to it from the one before.
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
        """From one tensor, of shape [7]."""
        return ClockState(*packed.unbind())

    def pack(self) -> torch.Tensor:
        """As one tensor, of shape [7]."""
        return torch.stack(list(self))

    def advanced(self, value: torch.Tensor, known: torch.Tensor) -> ClockState:
        """At a call with this timestep. `known`: it has the conditioning of the call before.

        One that moves on is the next step, and one that moves back against the direction so far is
        a new generation's first step. The same value is the next step too (timesteps that round to
        one value, samplers that evaluate one twice), and the same step for another conditioning,
        for which nothing is computed so far.
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
        """Steps since the last computed one; 0 before the first."""
        return torch.where(self.computed > 0, self.step - self.last, 0.0)

    def after(self, computes: torch.Tensor, distance: torch.Tensor) -> ClockState:
        """After the call's step, so far from the last computed one.

        A second evaluation of a step counts once.
        """
        counts = computes & ~((self.computed > 0) & (self.last == self.step))
        return self._replace(
            computed=torch.where(counts, self.computed + 1, self.computed),
            last=torch.where(computes, self.step, self.last),
            reach=torch.where(counts, distance, self.reach),
        )
