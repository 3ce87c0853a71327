"""Improve a predictor's steps by small moves of one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_cache_fx.calibration.simulate import Recorded
from dit_cache_fx.strategies import Strategy

#: the moves of a computed step, in indices
MOVES = (-4, -2, -1, 1, 2, 4)
#: the largest number of moves in one search
MOST_ROUNDS = 24
#: the least gain of a move, in dB
LEAST_GAIN = 0.01


def improved(recorded: Recorded, strategy: Strategy, mask: Tensor) -> tuple[Tensor, float]:
    """Return a schedule (bool [steps]) that no such move improves, and its score."""
    best = float(recorded.score(strategy, mask[None])[0])
    for _ in range(MOST_ROUNDS):
        others = neighbours(mask)
        if not len(others):
            break
        scores = recorded.score(strategy, others)
        place = int(scores.argmax())
        if float(scores[place]) < best + LEAST_GAIN:
            break
        mask, best = others[place], float(scores[place])
    return mask, best


def neighbours(mask: Tensor) -> Tensor:
    """Return every schedule with one computed step moved; the first step stays."""
    steps = mask.shape[0]
    moved = []
    for step in mask[1:].nonzero().flatten().add(1).tolist():
        for place in (step + move for move in MOVES):
            if 0 < place < steps and not mask[place]:
                other = mask.clone()
                other[step], other[place] = False, True
                moved.append(other)
    return torch.stack(moved) if moved else mask.new_zeros(0, steps)
