"""A sampler of toys: Euler's method with a timestep shift, and CFG in each of its forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.toys import DIM, TEXT, TOKENS, ToyDiT, make

STEPS = 8


def times(steps: int = STEPS, shift: float = 3.0) -> list[float]:
    """The sampler's times, with the end behind the last step."""
    even = [1 - k / steps for k in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def texts(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(1, TEXT, DIM, generator=generator).expand(batch, -1, -1).contiguous()


def noise(seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, DIM, generator=generator)


def velocity(model: Any, x: Tensor, time: float, cfg: str) -> Tensor:
    """`cfg`: none, "two calls", "contexts" or "batch"."""
    text, t = texts(len(x)), torch.full((len(x),), 1000 * time)
    if cfg == "batch":
        out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, 0 * text]))
        cond, null = out.chunk(2)
        return null + 2 * (cond - null)
    if cfg == "two calls":
        cond, null = model(x, t, text), model(x, t, 0 * text)
        return null + 2 * (cond - null)
    if cfg == "contexts":
        context = getattr(model, "cache_context", nullcontext)
        with context("cond"):
            cond = model(x, t, text)
        with context("uncond"):
            null = model(x, t, 0 * text)
        return null + 2 * (cond - null)
    return model(x, t, text)


def sample(
    model: Any, seed: int, *, batch: int = 1, cfg: str = "", steps: int = STEPS, shift: float = 3.0
) -> Tensor:
    """A generation: [batch, tokens, channels]."""
    x = noise(seed, batch)
    for now, then in pairwise(times(steps, shift)):
        x = x + (then - now) * velocity(model, x, now, cfg)
    return x


def runs_of(model: Any, seeds: Sequence[int] = (0, 1), **options: Any) -> list[Callable[[], Any]]:
    return [lambda seed=seed: sample(model, seed, **options) for seed in seeds]  # type: ignore[misc]


def toy(strategy: Any = "taylorcache", **options: Any) -> CachedModel:
    """A cached toy; without options it computes three steps."""
    if isinstance(strategy, str):
        options = options or {"computed_steps": 3}
    return dit_cache_fx.apply(make(ToyDiT), strategy, check=False, **options)


def calibrated(
    cached: CachedModel, runs: Any = None, computed: Any = (3, 4), **options: Any
) -> Any:
    options.setdefault("progress", False)
    return dit_cache_fx.calibrate(
        cached, runs_of(cached) if runs is None else runs, computed, **options
    )


def mean_db(model: Any, raw: Any, seeds: Sequence[int], **options: Any) -> float:
    """The mean PSNR in dB of a model's results to those of the uncached one, its range the peak."""
    with torch.no_grad():
        pairs = [(sample(model, s, **options), sample(raw, s, **options)) for s in seeds]
    low, high = min(b.min() for _, b in pairs), max(b.max() for _, b in pairs)
    errors = [(a - b).square().mean() / (high - low) ** 2 for a, b in pairs]
    return float(torch.stack([-10 * torch.log10(e) for e in errors]).mean())
