"""Find the best steps to compute by dynamic programming over pairs of computed steps.

Between two computed steps the outputs follow the line through the last two computed ones, and the
sampler accumulates the error `|sum of (predicted - true output) weight|^2`. It depends only on the
computed step before, the current one and the next one. So the best schedule follows from the best
ones up to each pair (Bellman: Dynamic Programming, 1957).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dit_cache_fx.calibration.simulate import Recorded


def best_schedules(
    recorded: Recorded, axis: Tensor, computed: Collection[int]
) -> dict[int, frozenset[int]]:
    """Return the steps to compute for each number of them.

    `axis` (float64 [steps]): the position of each step.
    """
    costs, steps = _costs(recorded, axis), len(recorded.timesteps)
    most = max(computed, default=0)
    best = torch.full((steps, steps), torch.inf, dtype=torch.float64)  # of (previous, current)
    best[0, 0] = 0.0  # the first step has none before it
    choices: list[Tensor] = []
    found: dict[int, frozenset[int]] = {}
    for count in range(1, most + 1):
        if count in computed:
            found[count] = _traced(best + costs[:, :, steps], choices)
        if count < most:
            totals = best[:, :, None] + costs[:, :, :steps]
            best, choice = totals.min(0)
            choices.append(choice)
    return found


def _traced(totals: Tensor, choices: list[Tensor]) -> frozenset[int]:
    """Return the steps that lead to the best pair."""
    previous, current = divmod(int(totals.argmin()), totals.shape[1])
    steps = {current}
    for choice in reversed(choices):
        steps.add(previous)
        previous, current = int(choice[previous, current]), previous
    return frozenset(steps)


def _costs(recorded: Recorded, axis: Tensor) -> Tensor:
    """Return the costs [previous, current, next]: infinite if they are not in order.

    Each sample's errors are relative to the curvature of its outputs, so that no outlier decides.
    """
    values, weights = recorded.values, recorded.weights
    steps, samples, rank = values.shape
    weighted = (values * weights[:, None, None]).cumsum(0)
    sums = torch.cat([values.new_zeros(1, samples, rank), weighted])
    costs = torch.full((steps, steps, steps + 1), torch.inf, dtype=torch.float64)
    bends = values.diff(n=2, dim=0).square().sum(2).mean(0)
    scale = 1 / bends.clamp(min=torch.finfo(torch.float64).tiny)
    for current in range(steps):
        inside = torch.zeros(steps + 1, dtype=torch.float64)  # the weights up to each next step
        moment = inside.clone()
        inside[current + 2 :] = weights[current + 1 :].cumsum(0)
        distances = axis[current + 1 :] - axis[current]
        moment[current + 2 :] = (weights[current + 1 :] * distances).cumsum(0)
        flat = inside[:, None, None] * values[current] - (sums - sums[min(current + 1, steps)])
        for previous in range(current if current else 1):
            gap = float(axis[current] - axis[previous])
            slope = (values[current] - values[previous]) / (gap or torch.inf)
            wrong = (flat + moment[:, None, None] * slope)[current + 1 :]
            costs[previous, current, current + 1 :] = (wrong.square().sum(2) * scale).mean(1)
    return costs
