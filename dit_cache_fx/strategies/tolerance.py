"""A tolerance for the error of prediction, as the solvers of differential equations have one.

A computed step tells what the prediction for it would have been wrong by, at no cost. From that
error e over a gap of g steps, the error of a gap of n steps is expected to be `e (n / g)^3` (Hairer,
Nørsett, Wanner: Solving Ordinary Differential Equations I, section II.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: how much longer than the last a gap may be: the estimate is good near the gap it was made over
MOST_GROWTH = 3.0
#: how the error grows with the gap
ORDER = 3


def measured_error(value: Tensor, predicted: Tensor, distance: Tensor, computed: Tensor) -> Tensor:
    """The relative error of a prediction, and the gap that it was made over."""
    error = (value - predicted).double().norm() / value.double().norm()
    known = torch.where(computed > 0, error, math.nan)
    return torch.stack([known, distance.clamp(min=1.0).to(known.device)])


def expected_error(measured: Tensor, distance: Tensor) -> Tensor:
    """The error to expect at the next step, if this one is not computed: the worst value's.

    Not a number where nothing is known yet, infinite where the gap would grow too much.
    """
    errors, gaps = measured.unbind(dim=1)
    growth = (distance + 1) / gaps
    worst = (errors * growth**ORDER).max()
    return torch.where((growth > MOST_GROWTH).any(), math.inf, worst)
