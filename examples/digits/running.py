"""Runs a system and measures it."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dit_cache_fx
from examples.digits.systems import System
from examples.flow.sampling import OnStep, guided, start

SEED = 0


@dataclass(frozen=True)
class Run:
    """A system's pictures [B, 1, 8, 8] and cost; `report` is None without a cache."""

    system: System
    pictures: Tensor
    computed: int
    seconds: float
    report: dit_cache_fx.CacheReport | None = None

    @property
    def cache_bytes(self) -> int:
        return 0 if self.report is None else self.report.bytes_held


@torch.inference_mode()
def run(system: System, model: nn.Module, samples: int, on_step: OnStep) -> Run:
    """Generate the seeded samples with the system."""
    if system.strategy is None:
        pictures, seconds = generate(system, model, samples, on_step)
        return Run(system, pictures, system.steps, seconds)
    cached = dit_cache_fx.apply(model, strategy=system.strategy, **system.options)
    noise, labels = start(model, samples, SEED)
    guided(cached, labels)(noise, 1.0)  # captures the graph, which is not timed
    cached.clear_states()
    pictures, seconds = generate(system, cached, samples, on_step)
    report = cached.cache_report()
    return Run(system, pictures, report.steps_computed, seconds, report)


def generate(
    system: System, model: nn.Module, samples: int, on_step: OnStep
) -> tuple[Tensor, float]:
    """The pictures [B, 1, 8, 8] and the CPU seconds that they took (steady on a busy machine)."""
    noise, labels = start(model, samples, SEED)
    velocity = guided(model, labels)
    begin = time.process_time()
    pictures = system.sampler(velocity, noise, system.at, on_step)
    return pictures, time.process_time() - begin
