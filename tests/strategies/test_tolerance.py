"""The error that a gap is expected to add up."""

from __future__ import annotations

import math

import torch

from dit_cache_fx.strategies.tolerance import MOST_GROWTH, expected_error


def test_of_several_values_the_worst_one_counts() -> None:
    """Twice the gap: the error, added up over the gap, is eight times as large."""
    measured = torch.tensor([[0.01, 0.1], [0.04, 0.1], [0.02, 0.1]], dtype=torch.float64)
    onward = torch.tensor(0.2, dtype=torch.float64)
    assert math.isclose(expected_error(measured, onward).item(), 0.04 * 0.1 * 8)


def test_a_gap_that_would_grow_too_much_is_too_long_for_all_values() -> None:
    measured = torch.tensor([[0.0, 0.1], [0.0, 0.2]], dtype=torch.float64)
    onward = torch.tensor(0.1 * MOST_GROWTH, dtype=torch.float64)
    assert expected_error(measured, onward * 0.999).item() == 0.0
    assert expected_error(measured, onward * 1.001).item() == math.inf
