"""Record a generation in which every step is computed.

For each call a bounded number of the output's elements is kept, on the CPU, for a window of the
newest steps. After the generation only a few numbers per step and sample remain, with the same
scalar products as the outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_cache_fx.calibration.engines import Call
from dit_cache_fx.calibration.probe import probe
from dit_cache_fx.runtime.tracking.generation import Generation

#: the largest number of steps of a generation to keep: its newest
MAX_STEPS = 128
#: the largest number of samples of a generation to keep
MAX_SAMPLES = 32
#: eigenvalues below this part of the largest one are ignored
_RANK = 1e-11
#: the largest share of a step's change that a one-step sampler may leave unexplained
_MOST_UNEXPLAINED = 0.3


@dataclass(frozen=True)
class Trajectory:
    """The model's outputs over one generation.

    `values` (float64 [samples, rank, steps]): have the same scalar products as the outputs, per
    element. `weights` (float64 [steps]): by how much an error in each output moves the result.
    """

    values: Tensor
    weights: Tensor


@dataclass
class _Steps:
    """The newest steps of a generation: the elements of each call's sample and output."""

    timesteps: list[float] = field(default_factory=list)
    samples: OrderedDict[int, list[Tensor | None]] = field(default_factory=OrderedDict)
    outputs: OrderedDict[int, list[Tensor]] = field(default_factory=OrderedDict)
    batch: int = 1


class Recorder:
    """Listens to the calls of one run."""

    def __init__(self) -> None:
        self.start: Tensor | None = None  # elements of the first call's sample
        self._generations: dict[Generation, _Steps] = {}

    def __call__(self, call: Call) -> None:
        steps = self._generations.setdefault(call.generation, _Steps())
        if call.step == len(steps.timesteps):
            steps.timesteps.append(call.timestep)
        if self.start is None and call.sample is not None:
            self.start = probe(call.sample)
        if call.output is None:
            return
        steps.batch = call.output.shape[0] if call.output.ndim > 1 else 1
        sample = call.sample
        alike = sample is not None and sample.shape == call.output.shape
        steps.samples.setdefault(call.step, []).append(probe(sample) if alike else None)  # type: ignore[arg-type]
        steps.outputs.setdefault(call.step, []).append(probe(call.output))
        while len(steps.outputs) > MAX_STEPS:
            steps.samples.popitem(last=False)
            steps.outputs.popitem(last=False)

    @property
    def timesteps(self) -> list[tuple[float, ...]]:
        """The timesteps of each generation of the run."""
        return [tuple(steps.timesteps) for steps in self._generations.values()]

    @property
    def batch(self) -> int:
        """The number of samples in a call of the model."""
        return max((steps.batch for steps in self._generations.values()), default=1)

    def trajectories(self) -> list[Trajectory]:
        """Return those of the generations whose steps are complete and have equal shapes."""
        found = [_trajectory(steps) for steps in self._generations.values()]
        return [trajectory for trajectory in found if trajectory is not None]


def _trajectory(steps: _Steps) -> Trajectory | None:
    number = len(steps.timesteps)
    calls = [steps.outputs.get(step, []) for step in range(number)]
    shapes = {tuple(output.shape for output in outputs) for outputs in calls}
    if number < 3 or len(shapes) != 1 or not calls[0] or len({o.shape for o in calls[0]}) != 1:
        return None
    outputs = torch.stack([torch.stack(c) for c in calls]).double()  # [steps, branches, rows, n]
    samples = _samples(steps, number)
    if samples is not None:
        outputs = _by_sample(outputs, samples)
        samples = samples[:, : outputs.shape[2]]
    moves = _moves(steps.timesteps)
    shares, weights = _fitted(samples, outputs, moves) or _even(outputs, moves)
    combined = torch.einsum("kbrn,b->rkn", outputs, shares)
    return Trajectory(_compressed(combined[:MAX_SAMPLES]), weights)


def _samples(steps: _Steps, number: int) -> Tensor | None:
    """Return the samples of the steps' first calls [steps, rows, elements], if all are known."""
    found = [steps.samples.get(step, [None])[0] for step in range(number)]
    known = [sample for sample in found if sample is not None]
    return torch.stack(known).double() if len(known) == number else None


def _by_sample(outputs: Tensor, samples: Tensor) -> Tensor:
    """Turn rows of one call that come from the same sample (CFG in a batch) into branches."""
    first, rows = samples[0], samples.shape[1]
    for parts in (4, 3, 2):
        if rows % parts == 0 and torch.equal(first, first[: rows // parts].repeat(parts, 1)):
            steps, branches, _, elements = outputs.shape
            return outputs.reshape(steps, branches * parts, rows // parts, elements)
    return outputs


def _moves(timesteps: Sequence[float]) -> Tensor:
    """Return how far each step moves the timestep; after the last one it goes to its end."""
    times = torch.tensor(timesteps, dtype=torch.float64)
    last, way = float(times[-1]), float(times[-1] - times[0])
    ends = [0.0] if way < 0 else [1.0, 1000.0]
    end = next((e for e in ends if (e - last) * way > 0), last + float(times[-1] - times[-2]))
    return torch.diff(times, append=torch.tensor([end], dtype=torch.float64))


def _even(outputs: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Return branches of equal weight, and weights by timestep."""
    branches = outputs.shape[1]
    return torch.full((branches,), 1 / branches, dtype=torch.float64), moves


def _fitted(samples: Tensor | None, outputs: Tensor, moves: Tensor) -> tuple[Tensor, Tensor] | None:
    """Fit the shares of the branches and the weights to the sampler's steps.

    Each step is modelled as `x' = a x + sum b[i] v[i]` with scalars, as in every one-step sampler.
    Then an error in `v` moves the result by `b` times the `a` of the later steps. None if the steps
    do not have this form.
    """
    if samples is None:
        return None
    fits = [_fit(samples[k], outputs[k], samples[k + 1]) for k in range(len(samples) - 1)]
    known = [fit for fit in fits if fit is not None]
    if len(known) < len(fits):
        return None
    factors = torch.tensor([fit[0] for fit in known], dtype=torch.float64)
    gains = torch.stack([fit[1] for fit in known])  # [steps - 1, branches]
    shares = gains.sum(0) / gains.sum()
    total = gains.sum(1)
    behind = torch.cat([factors[1:].flip(0).cumprod(0).flip(0), torch.ones(1).double()])
    last = total[-1] * moves[-1] / moves[-2] if moves[-2] else total[-1]
    weights = torch.cat([total * behind, last[None]])
    finite = bool(weights.isfinite().all() and shares.isfinite().all())
    return (shares, weights) if finite and float(shares.abs().max()) < 1e3 else None


def _fit(sample: Tensor, outputs: Tensor, following: Tensor) -> tuple[float, Tensor] | None:
    """Return `a` and `b` of a step, by least squares; None if they do not explain it."""
    columns = torch.stack([sample.flatten(), *(o.flatten() for o in outputs)], dim=1)
    solution = torch.linalg.lstsq(columns, following.flatten()[:, None], driver="gelsd").solution
    missed = (columns @ solution).flatten() - following.flatten()
    change = following.flatten() - sample.flatten()
    if float(missed.norm()) > _MOST_UNEXPLAINED * float(change.norm()):
        return None
    return float(solution[0]), solution[1:, 0]


def _compressed(outputs: Tensor) -> Tensor:
    """Return [samples, steps, elements] as [samples, rank, steps] with equal scalar products."""
    gram = torch.einsum("ske,sme->skm", outputs, outputs) / outputs.shape[2]
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = int((eigenvalues > _RANK * eigenvalues.max()).any(0).sum())
    root = eigenvalues[:, -kept:].clamp(min=0).sqrt()
    scaled: Tensor = vectors[:, :, -kept:] * root[:, None]
    return scaled.transpose(1, 2)
