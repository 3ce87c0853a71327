"""Samplers of the flow from noise (t=1) to pictures (t=0), with classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from examples.digits.model import IMAGE_SIZE, NULL_CLASS, NUM_CLASSES

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B, 1, 8, 8], t [B], y [B] -> velocity
Velocity = Callable[[Tensor, float], Tensor]  # x [B, 1, 8, 8], t -> velocity [B, 1, 8, 8]
OnStep = Callable[[int], None]  # called with the step's number once the step is done
Sampler = Callable[[Velocity, Tensor, int, OnStep], Tensor]

GUIDANCE = 2.0


def start(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded noise [B, 1, 8, 8] and the labels [B] 0, 1, ..., 9, 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return noise, torch.arange(samples) % NUM_CLASSES


def guided(model: Model, labels: Tensor, scale: float = GUIDANCE) -> Velocity:
    """Velocity under guidance: both branches go through the model in one batched call."""
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])

    def velocity(x: Tensor, t: float) -> Tensor:
        out = model(torch.cat([x, x]), torch.full((len(both),), t), both)
        cond, null = out.chunk(2)
        return null + scale * (cond - null)

    return velocity


def ignore(step: int) -> None:
    """The step callback that does nothing."""


def euler(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep = ignore) -> Tensor:
    """First-order sampler: noise [B, 1, 8, 8] -> pictures in [-1, 1]."""
    x = noise
    for step in range(steps):
        x = x - velocity(x, 1 - step / steps) / steps
        on_step(step)
    return x.clamp(-1, 1)


def adams_bashforth2(
    velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep = ignore
) -> Tensor:
    """Second-order multistep sampler (its first step is Euler's), one model call a step."""
    x = noise
    before: Tensor | None = None
    for step in range(steps):
        now = velocity(x, 1 - step / steps)
        slope = now if before is None else 1.5 * now - 0.5 * before
        x, before = x - slope / steps, now
        on_step(step)
    return x.clamp(-1, 1)
