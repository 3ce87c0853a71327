"""Samplers of the flow from noise (t=1) to pictures (t=0), with classifier-free guidance."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B, C, S, S], t [B], y [B] -> velocity
Velocity = Callable[[Tensor, float], Tensor]  # x [B, C, S, S], t -> velocity [B, C, S, S]
OnStep = Callable[[int], None]  # called with the step's number once the step is done
Sampler = Callable[[Velocity, Tensor, Sequence[float], OnStep], Tensor]

GUIDANCE = 2.0


def start(model: Any, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded noise [B, C, S, S] for a `DiT`, and the labels [B] 0, 1, ..., 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, model.channels, model.size, model.size, generator=generator)
    return noise, torch.arange(samples) % model.classes


def times(steps: int, shift: float = 1.0) -> list[float]:
    """The times of the steps, and 0 behind them, as pipelines with a timestep shift place them."""
    even = [1 - k / steps for k in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def plain(model: Model, labels: Tensor) -> Velocity:
    """Velocity without guidance."""
    return lambda x, t: model(x, torch.full((len(labels),), t), labels)


def guided(model: Any, labels: Tensor, scale: float = GUIDANCE) -> Velocity:
    """Velocity under guidance: both branches go through the model in one batched call."""
    both = torch.cat([labels, torch.full_like(labels, model.classes)])

    def velocity(x: Tensor, t: float) -> Tensor:
        out = model(torch.cat([x, x]), torch.full((len(both),), t), both)
        cond, null = out.chunk(2)
        return null + scale * (cond - null)

    return velocity


def ignore(step: int) -> None:
    """The step callback that does nothing."""


def euler(
    velocity: Velocity, noise: Tensor, at: Sequence[float], on_step: OnStep = ignore
) -> Tensor:
    """First-order sampler: noise [B, C, S, S] -> pictures in [-1, 1]. `at`: as `times` gives."""
    x = noise
    for step, (now, then) in enumerate(pairwise(at)):
        x = x + (then - now) * velocity(x, now)
        on_step(step)
    return x.clamp(-1, 1)


def adams_bashforth2(
    velocity: Velocity, noise: Tensor, at: Sequence[float], on_step: OnStep = ignore
) -> Tensor:
    """Second-order multistep sampler (its first step is Euler's), one model call a step."""
    x = noise
    before: Tensor | None = None
    last = 1.0
    for step, (now, then) in enumerate(pairwise(at)):
        move, slope = then - now, velocity(x, now)
        line = slope if before is None else slope + (slope - before) * (move / last / 2)
        x, before, last = x + move * line, slope, move
        on_step(step)
    return x.clamp(-1, 1)
