"""Determine from sample and timestep whether a call continues the calls before it.

A sampler moves its sample by little from one step to the next, and about as far for the same move
of the timestep. A sample from elsewhere (another request with the same prompt, another window of
one picture, an aborted run) is much farther away. The comparison uses a few hundred elements.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
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
#: one that moved out of proportion is in doubt if it is this similar ...
ALIKE = 0.8
#: ... or has grown this many times: no fresh sample is larger than an old one
GROWN = 2.0


class Verdict(IntEnum):
    """Whether a call continues the one before: yes, perhaps, no."""

    CONTINUES = 0
    DOUBTFUL = 1
    OTHER = 2


class SampleProbe:
    """Some elements of a noisy sample, float32 on its device."""

    _shortest = 0.0  # a lower bound of the length, if it is not known

    def __init__(self, sample: torch.Tensor) -> None:
        sample = own_part(sample.detach() if sample.requires_grad else sample)
        real = torch.view_as_real(sample.resolve_conj()) if sample.is_complex() else sample
        stride = max(1, real.numel() // PROBED) | 1  # odd: not a single column of a picture
        if real.is_contiguous():
            picked = real.as_strided((-(-real.numel() // stride),), (stride,))
        else:
            picked = real.reshape(-1)[::stride]
        same = picked.dtype == torch.float32
        self.values = picked.clone() if same else picked.to(torch.float32)

    @staticmethod
    def of(values: torch.Tensor) -> SampleProbe:
        """Wrap elements that are selected already."""
        probe = SampleProbe.__new__(SampleProbe)
        probe.values = values
        return probe

    @functools.cached_property
    def square(self) -> float:
        """The scalar product with itself; reading it waits for the device."""
        return self.values.dot(self.values).item()

    @property
    def shortest(self) -> float:
        """A lower bound of the length that needs no computation."""
        return math.sqrt(self.square) if "square" in vars(self) else self._shortest

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

    def similar(self, other: SampleProbe, distance: float | None = None) -> bool:
        """Return whether both point the same way, more than by chance. Waits for the device.

        `distance`: between both, if it is known already. A short one suffices: it turns a vector of
        length r by an angle of at most asin(distance / r).
        """
        least = min(SIMILAR + 2 / math.sqrt(max(self.values.numel(), 1)), 0.98)
        near = other.shortest * math.sqrt(1 - least**2)
        if distance is not None and distance <= near and 0 < near < math.inf:
            self._shortest = other.shortest - distance
            return True
        return self._points_as(other, least, distance)

    def grown_from(self, other: SampleProbe) -> bool:
        """Return whether a long step may have turned the other sample into this one. Waits."""
        return self._points_as(other, ALIKE) or self.square >= GROWN**2 * other.square

    def _points_as(self, other: SampleProbe, least: float, distance: float | None = None) -> bool:
        """Return whether the cosine of the angle between both is at least this.

        A known distance gives the scalar product by the law of cosines.
        """
        if distance is None:
            dot = self.values.dot(other.values).item()
        else:
            dot = (self.square + other.square - distance * distance) / 2
        return dot >= least * math.sqrt(self.square * other.square)


class Judgement(NamedTuple):
    """A verdict, and the move of the sample if it was compared."""

    verdict: Verdict
    change: float | None = None


class Trajectory(NamedTuple):
    """The calls of one branch so far: its newest timestep and sample, and their largest moves.

    `move`, `change`, `speed`: the largest move of the timestep, change of the sample and quotient
    of both, from step to step. `steady`: each sample was similar to the one before.
    """

    value: TimestepValue | None = None
    explicit: bool = False
    sample: SampleProbe | None = None
    move: float = 0.0
    change: float = 0.0
    speed: float = 0.0
    steady: bool = True

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
        far, fast, steady = self.change, self.speed, self.steady
        if change is not None:
            far, fast = max(far, change), max(fast, change / move if move else 0.0)
            steady = steady and self.similar(sample, change)
        return Trajectory(value, explicit, sample, max(self.move, move), far, fast, steady)

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
        verdicts = [self._jumped(jump, sample)]
        if change is not None:
            verdicts.append(self._moved(value, move, change, sample))
        return Judgement(max(verdicts), change)

    def stands_at(self, value: TimestepValue) -> bool:
        """Return whether the newest timestep is this one."""
        return self.value is not None and distance(self.value, value) == 0

    def similar(self, sample: SampleProbe | None, change: float | None = None) -> bool:
        """Return whether a sample is known to resemble the newest one. May wait for the device.

        `change`: how far it has moved, if that is known already.
        """
        both = sample is not None and self.sample is not None and sample.comparable(self.sample)
        return both and sample.similar(self.sample, change)  # type: ignore[union-attr, arg-type]

    def _distance(self, sample: SampleProbe | None, wait: bool) -> float | None:
        """Return the distance of a sample from the newest one; None if unknown."""
        if sample is None or self.sample is None or not sample.comparable(self.sample):
            return None
        if not (sample.values.is_cpu or wait):
            return None
        return sample.distance(self.sample)

    def _moved(
        self, value: TimestepValue, move: float, change: float, sample: SampleProbe | None
    ) -> Verdict:
        """Judge by the change of the sample. NaN is out of proportion."""
        if self.change == 0:  # the sampler is unknown
            unlikely = (move == 0 and change != 0) or self._rises_far(value)
            return Verdict.OTHER if unlikely and not self.similar(sample) else Verdict.CONTINUES
        far = max(OTHER_CHANGE * self.change, OTHER_SPEED * self.speed * move)
        unlike = self.steady and not change <= self.change and not self.similar(sample, change)
        if change <= far and not unlike:
            return Verdict.CONTINUES
        assert sample is not None
        assert self.sample is not None
        return Verdict.DOUBTFUL if sample.grown_from(self.sample) else Verdict.OTHER

    def _jumped(self, jump: Jump, sample: SampleProbe | None) -> Verdict:
        """Judge by the move of the timestep; a similar sample makes up for one grade of it."""
        if jump is Jump.NONE:
            return Verdict.CONTINUES
        return Verdict(jump - self.similar(sample))

    def _rises_far(self, value: TimestepValue) -> bool:
        """Return whether the first move is upwards by more than half of the range of timesteps.

        A model may be called on a given picture, at timestep 0, before its sampler starts.
        """
        if self.move or self.explicit or self.value is None:
            return False
        span = 1.0 if as_number(value) <= 1 else 1000.0
        return movement(self.value, value)[0] > span / 2
