"""Which of the judged candidates becomes the plan."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dit_cache_fx import DeepCache
from dit_cache_fx.calibration.candidates import Candidate
from dit_cache_fx.calibration.judge import Judged, winner

PRESET = [30.0, 31.0, 29.0, 33.0]


def judged(samples: Sequence[float], preset: bool = False) -> Judged:
    """A candidate with one sample in each run."""
    candidate = Candidate(DeepCache(no_cache_steps={0}), frozenset({0}), "even", preset)
    return Judged(candidate, [[sample] for sample in samples])


@pytest.mark.parametrize(
    ("gains", "wins"),
    [
        ([0.1, 0.12, 0.09, 0.11], True),
        ([3.0, -2.0, 2.5, -1.5], False),
        ([0.1, 0.2], False),
        ([0.4, 0.5], True),
        ([-0.1, -0.1, -0.1, -0.1], False),
    ],
    ids=["steady", "scattered", "too few and too small", "few and large", "worse"],
)
def test_a_gain_within_chance_is_none(gains: Sequence[float], wins: bool) -> None:
    preset = judged(PRESET[: len(gains)], preset=True)
    other = judged([a + b for a, b in zip(PRESET, gains, strict=False)])
    assert winner([preset, other], len(gains)) is (other if wins else preset)


def test_only_those_that_were_judged_on_all_runs_are_asked() -> None:
    preset, other = judged(PRESET, preset=True), judged([60.0, 60.0])
    assert winner([preset, other], 4) is preset
    assert winner([other], 4) is None
