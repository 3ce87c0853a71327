"""A trained model with noise to start from, and how near pictures come to its uncached ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dit_cache_fx
from examples.digits import checkpoint as digits
from examples.flow.model import DiT
from examples.flow.sampling import Sampler, euler, guided, ignore, plain, start, times
from examples.shapes import checkpoint as shapes

MODELS: dict[str, Callable[[], DiT]] = {"digits": digits.load, "shapes": shapes.load}


@dataclass(frozen=True, eq=False)
class Task:
    """Noise [B, C, S, S] and labels [B] for a model. `guide`: with classifier-free guidance."""

    model: DiT
    noise: Tensor
    labels: Tensor
    guide: bool = False
    _uncached: dict[tuple[int, float], Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(name: str, samples: int, seeds: Iterable[int], guide: bool = False) -> Task:
        """So many samples for each seed."""
        model = MODELS[name]()
        noise, labels = zip(*(start(model, samples, seed) for seed in seeds), strict=True)
        return Task(model, torch.cat(noise), torch.cat(labels), guide)

    @torch.inference_mode()
    def pictures(self, model: Any, at: Sequence[float], sampler: Sampler = euler) -> Tensor:
        """Pictures of a model in the place of the task's own."""
        velocity = (guided if self.guide else plain)(model, self.labels)
        return sampler(velocity, self.noise, at, ignore)

    def uncached(self, steps: int, shift: float) -> Tensor:
        """The pictures of Euler's method without a cache."""
        if (steps, shift) not in self._uncached:
            self._uncached[steps, shift] = self.pictures(self.model, times(steps, shift))
        return self._uncached[steps, shift]

    def decibels(self, pictures: Tensor, steps: int, shift: float) -> float:
        """The mean over the samples of their PSNR to the uncached ones; pixels are in [-1, 1]."""
        error = (pictures - self.uncached(steps, shift)).square().flatten(1).mean(1)
        return float((10 * torch.log10(4 / error)).mean())

    def sampled(self, sampler: Sampler, few: int, steps: int, shift: float) -> float:
        """Decibels of another sampler, or of fewer steps."""
        return self.decibels(self.pictures(self.model, times(few, shift), sampler), steps, shift)

    def cached(
        self, strategy: str, steps: int, shift: float, known: bool = True, **options: Any
    ) -> tuple[float, int]:
        """Decibels with a cache, and how many steps were computed.

        `known`: the cache is told the timesteps, else their number alone.
        """
        at = times(steps, shift)
        told = {"timesteps": at[:-1]} if known else {"num_steps": steps}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dit_cache_fx.DitCacheWarning)
            cached = dit_cache_fx.apply(self.model, strategy, **told, **options)
            pictures = self.pictures(cached, at)
        computed: int = cached.cache_report().steps_computed
        return self.decibels(pictures, steps, shift), computed
