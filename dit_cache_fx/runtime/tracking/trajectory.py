"""Determine from sample and timestep whether a call continues the calls before it.

A sampler moves its sample by little from one step to the next, and about as far for the same move
of the timestep. A sample from elsewhere (another request with the same prompt, another window of
one picture, an aborted run) is much farther away. The comparison uses a few hundred elements.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dit_cache_fx.runtime.tracking.generation import Jump
from dit_cache_fx.runtime.tracking.timestep_value import (
    TimestepValue,
    as_number,
    distance,
    movement,
)
from dit_cache_fx.values.wrapped import own_part

#: the number of elements that are compared
PROBED = 512
#: a sample that moves this many times as fast as ever before is another one
OTHER_SPEED = 3.0
#: in addition, and for a constant timestep: how many times as far as ever before
OTHER_CHANGE = 2.0
#: for an unknown sampler, samples are of one trajectory from this similarity (cosine) on
SIMILAR = 0.5
#: one that moved out of proportion still belongs if it is this similar ...
ALIKE = 0.8
#: ... or has grown this many times: no fresh sample is larger than an old one
GROWN = 2.0


class Verdict(Enum):
    """Whether a call continues the one before: yes, perhaps, no."""

    CONTINUES = 0
    DOUBTFUL = 1
    OTHER = 2


class SampleProbe:
    """Some elements of a noisy sample, float32 on its device."""

    def __init__(self, sample: torch.Tensor) -> None:
        sample = own_part(sample.detach() if sample.requires_grad else sample)
        real = torch.view_as_real(sample) if sample.is_complex() else sample
        stride = max(1, real.numel() // PROBED) | 1  # odd: not a single column of a picture
        picked = real.reshape(-1)[::stride]
        same = picked.dtype == torch.float32
        self.values = picked.clone() if same else picked.to(torch.float32)

    @staticmethod
    def of(values: torch.Tensor) -> SampleProbe:
        """Wrap elements that are selected already."""
        probe = SampleProbe.__new__(SampleProbe)
        probe.values = values
        return probe

    @property
    def plain(self) -> bool:
        """Return whether all elements are the same. Waits for the device."""
        return bool((self.values == self.values[:1]).all())

    def padded(self) -> torch.Tensor:
        """Return the elements padded with zeros: the same number for samples of any size."""
        return pad(self.values, (0, 2 * PROBED - self.values.numel()))

    def comparable(self, other: SampleProbe) -> bool:
        """Return whether both are of samples of one size and device."""
        a, b = self.values, other.values
        return a.shape == b.shape and a.device == b.device

    def distance(self, other: SampleProbe) -> float:
        """Return the Euclidean distance. Waits for the device."""
        return torch.dist(self.values, other.values).item()

    def similar(self, other: SampleProbe) -> bool:
        """Return whether both point the same way, more than by chance. Waits for the device."""
        dot, now, before = self._products(other)
        least = min(SIMILAR + 2 / math.sqrt(max(self.values.numel(), 1)), 0.98)
        return dot >= least * math.sqrt(now * before)

    def grown_from(self, other: SampleProbe) -> bool:
        """Return whether a long step may have turned the other sample into this one. Waits."""
        dot, now, before = self._products(other)
        return dot >= ALIKE * math.sqrt(now * before) or now >= GROWN**2 * before

    def _products(self, other: SampleProbe) -> tuple[float, float, float]:
        """Return the scalar product of both, and of each with itself."""
        a, b = self.values, other.values
        dot, now, before = torch.stack([a.dot(b), a.dot(a), b.dot(b)]).tolist()
        return dot, now, before


class Judgement(NamedTuple):
    """A verdict, and the move of the sample if it was compared."""

    verdict: Verdict
    change: float | None = None


class Trajectory(NamedTuple):
    """The calls of one branch so far: its newest timestep and sample, and their largest moves.

    `move`, `change`, `speed`: the largest move of the timestep, change of the sample and quotient
    of both, from step to step.
    """

    value: TimestepValue | None = None
    explicit: bool = False
    sample: SampleProbe | None = None
    move: float = 0.0
    change: float = 0.0
    speed: float = 0.0

    def after(
        self,
        value: TimestepValue,
        explicit: bool,
        sample: SampleProbe | None,
        change: float | None,
    ) -> Trajectory:
        """Add a call that continues the trajectory; the sample has moved by `change`."""
        if self.value is None or explicit != self.explicit:
            return Trajectory(value, explicit, sample)
        move = distance(self.value, value)
        far, fast = self.change, self.speed
        if change is not None:
            far, fast = max(far, change), max(fast, change / move if move else 0.0)
        return Trajectory(value, explicit, sample, max(self.move, move), far, fast)

    def judge(
        self,
        value: TimestepValue,
        explicit: bool,
        sample: SampleProbe | None,
        wait: bool,
        jump: Jump = Jump.NONE,
    ) -> Judgement:
        """Judge whether a call whose timestep does not move back continues from the newest one.

        `wait`: compare the samples even if the host has to wait for the device. `jump`: how far out
        of proportion the timestep has moved in its generation.
        """
        if self.value is None or explicit != self.explicit:
            return Judgement(Verdict.OTHER)
        move, doubtful = distance(self.value, value), jump is not Jump.NONE
        change = self._distance(sample, wait or doubtful or move == 0 or self._rises_far(value))
        if change is not None and self._elsewhere(value, move, change, sample):
            return Judgement(Verdict.OTHER, change)
        if doubtful and not self.similar(sample):
            return Judgement(Verdict.OTHER if jump is Jump.FAR else Verdict.DOUBTFUL, change)
        return Judgement(Verdict.CONTINUES, change)

    def stands_at(self, value: TimestepValue) -> bool:
        """Return whether the newest timestep is this one."""
        return self.value is not None and distance(self.value, value) == 0

    def similar(self, sample: SampleProbe | None) -> bool:
        """Return whether a sample is known to resemble the newest one. May wait for the device."""
        both = sample is not None and self.sample is not None and sample.comparable(self.sample)
        return both and sample.similar(self.sample)  # type: ignore[union-attr, arg-type]

    def _distance(self, sample: SampleProbe | None, wait: bool) -> float | None:
        """Return the distance of a sample from the newest one; None if unknown."""
        if sample is None or self.sample is None or not sample.comparable(self.sample):
            return None
        if not (sample.values.is_cpu or wait):
            return None
        return sample.distance(self.sample)

    def _elsewhere(
        self, value: TimestepValue, move: float, change: float, sample: SampleProbe | None
    ) -> bool:
        """Return whether the sample has moved out of proportion. NaN has."""
        if self.change == 0:  # the sampler is unknown
            unlikely = (move == 0 and change != 0) or self._rises_far(value)
            return unlikely and not self.similar(sample)
        if change <= OTHER_CHANGE * self.change or change <= OTHER_SPEED * self.speed * move:
            return False
        assert sample is not None
        assert self.sample is not None
        return not sample.grown_from(self.sample)

    def _rises_far(self, value: TimestepValue) -> bool:
        """Return whether the first move is upwards by more than half of the range of timesteps.

        A model may be called on a given picture, at timestep 0, before its sampler starts.
        """
        if self.move or self.explicit or self.value is None:
            return False
        span = 1.0 if as_number(value) <= 1 else 1000.0
        return movement(self.value, value)[0] > span / 2
