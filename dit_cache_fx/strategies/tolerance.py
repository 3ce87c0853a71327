"""A tolerance for the error of prediction, as the solvers of differential equations have one.

A computed step tells how wrong the prediction for it would have been, at no cost. Over a gap g, as
a share of the whole noise range, such errors add up to about e g, with e the relative error at the
gap's end. A line is wrong by the square of the distance, so a gap n is expected to add up
`e g (n / g)^3`: a solver chooses its step in the same way (Hairer, Norsett, Wanner: Solving
Ordinary Differential Equations I, section II.4). For the first gap no error is known yet. There the
newest value is the prediction, and values change by about themselves over the whole range: e = n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_cache_fx.strategies.clock import Clock

#: how much longer than the last a gap may be: the estimate is good near the gap it was made over.
#: Below 2 there would be no way from steps that are all computed to every other one
MOST_GROWTH = 2.5
#: how the error that a gap adds up grows with its length
ORDER = 3


def measured_error(missed: Tensor, size: Tensor, clock: Clock) -> Tensor:
    """The relative error of a prediction, and the gap that it was made over.

    `missed`, `size`: the norms of the error and of the value. Error and gap are 0 where there was
    none; the error is no number where the value is none.
    """
    known = clock.computed > 0
    error = torch.where(known, missed, 0.0) / size
    gap = torch.where(known, clock.way[0], 0.0)
    return torch.stack([error, gap.to(error.device)])


def expected_error(measured: Tensor, onward: Tensor) -> Tensor:
    """The error that a gap up to the next step is expected to add up: the worst value's.

    Infinite where the gap would grow too much.
    """
    errors, gaps = measured.unbind(dim=1)
    first = gaps == 0
    growth = onward / torch.where(first, 1.0, gaps)
    added = torch.where(first, errors + onward**2, errors * gaps * growth**ORDER)
    too_far = (growth > MOST_GROWTH) & ~first
    return torch.where(too_far.any(), math.inf, added.max())
