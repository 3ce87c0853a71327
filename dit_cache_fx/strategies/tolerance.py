"""A tolerance for the error of prediction, as the solvers of differential equations have one.

A computed step tells how wrong the prediction for it would have been, at no cost. Over a gap of g
steps such errors add up to about e g, with e the relative error at the gap's end. A line is wrong
by the square of the distance, so a gap of n steps is expected to add up `e g (n / g)^3`: a solver
chooses its step in the same way (Hairer, Norsett, Wanner: Solving Ordinary Differential Equations
I, section II.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: how much longer than the last a gap may be: the estimate is good near the gap it was made over
MOST_GROWTH = 3.0
#: how the error that a gap adds up grows with its length
ORDER = 3


def measured_error(missed: Tensor, size: Tensor, distance: Tensor, computed: Tensor) -> Tensor:
    """The relative error of a prediction, and the gap that it was made over.

    `missed`, `size`: the norms of the error and of the value.
    """
    known = torch.where(computed > 0, missed / size, math.nan)
    return torch.stack([known, distance.clamp(min=1.0).to(known.device)])


def expected_error(measured: Tensor, distance: Tensor) -> Tensor:
    """The error to expect of a gap up to the next step: the worst value's.

    Not a number where nothing is known yet, infinite where the gap would grow too much.
    """
    errors, gaps = measured.unbind(dim=1)
    growth = (distance + 1) / gaps
    worst = (errors * gaps * growth**ORDER).max()
    return torch.where((growth > MOST_GROWTH).any(), math.inf, worst)
