"""An error tolerance for predictions, as in solvers of differential equations.

A computed step shows how wrong the prediction for it would have been, at no cost. Over a gap g, as
a share of the whole noise range, such errors add up to about e g, with e the relative error at the
gap's end. The error of a line grows with the square of the distance, so a gap n is expected to add
up `e g (n / g)^3`: a solver chooses its step in the same way (Hairer, Norsett, Wanner: Solving
Ordinary Differential Equations I, section II.4). For the first gap no error is known yet. There the
newest value is the prediction, and values change by about their own size over the whole range: e =
n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_cache_fx.strategies.clock import Clock

#: the largest growth from one gap to the next: the estimate is good near the gap that gave it.
#: Below 2 there would be no way from computing all steps to every other one
MOST_GROWTH = 2.5
#: the power of its length with which the error of a gap grows
ORDER = 3


def measured_error(missed: Tensor, size: Tensor, clock: Clock) -> Tensor:
    """Return the relative error of a prediction, and the gap that led to it.

    `missed`, `size`: the norms of the error and of the value. Error and gap are 0 without a
    prediction; the error is NaN if the value is.
    """
    known = clock.computed > 0
    error = torch.where(known, missed, 0.0) / size
    gap = torch.where(known, clock.way[0], 0.0)
    return torch.stack([error, gap.to(error.device)])


def expected_error(measured: Tensor, onward: Tensor) -> Tensor:
    """Return the expected error of a gap up to the next step: that of the worst value.

    Infinite if the gap would grow too much.
    """
    errors, gaps = measured.unbind(dim=1)
    first = gaps == 0
    growth = onward / torch.where(first, 1.0, gaps)
    added = torch.where(first, errors + onward**2, errors * gaps * growth**ORDER)
    too_far = (growth > MOST_GROWTH) & ~first
    return torch.where(too_far.any(), math.inf, added.max())
