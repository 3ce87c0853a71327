"""A serving engine in small: a pipeline that is run by whole requests or step by step.

Beside it, modules in the place of vllm-omni's, where that is not installed: the same names, and the
methods that a cache backend has there.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.toys import ToyDiT, make, toy_inputs


@dataclass
class Request:
    """What an engine knows of a request that it runs step by step."""

    request_id: str
    prompt: Tensor
    latents: Tensor
    timesteps: list[Tensor]
    step_index: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(number: int, steps: int) -> Request:
        inputs = toy_inputs(0.0, seed=number, prompt=number)
        return Request(f"r{number}", inputs["text"], inputs["x"], timesteps(steps))

    @property
    def over(self) -> bool:
        return self.step_index >= len(self.timesteps)


class Engine(nn.Module):
    """An engine's pipeline: a module that holds the transformer as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = make(ToyDiT)
        self.scheduler = SimpleNamespace(timesteps=None)

    @torch.no_grad()
    def forward(self, number: int, steps: int) -> Tensor:
        """A whole request."""
        request = Request.of(number, steps)
        self.scheduler.timesteps = torch.stack(request.timesteps)
        while not request.over:
            advance(request, self.noise([request]))
        return request.latents

    def denoise_step(self, input_batch: Any, *, states: Any = None, **more: Any) -> Tensor:
        return self.noise(input_batch)

    def noise(self, requests: list[Request]) -> Tensor:
        return self.transformer(
            x=torch.cat([r.latents for r in requests]),
            timestep=torch.stack([r.timesteps[r.step_index] for r in requests]),
            text=torch.cat([r.prompt for r in requests]),
        )

    @torch.no_grad()
    def together(self, requests: list[Request]) -> None:
        """One step of each, in one batch."""
        noise = self.denoise_step(requests, states=requests)
        for request, row in zip(requests, noise, strict=True):
            advance(request, row[None])


def advance(request: Request, noise: Tensor) -> None:
    request.latents = request.latents - 0.1 * noise
    request.step_index += 1


def timesteps(steps: int) -> list[Tensor]:
    """Of a sampler that shifts them: most of the way is made at the end."""
    even = [1 - i / steps for i in range(steps)]
    return [torch.tensor(1000 * 3 * u / (1 + 2 * u)) for u in even]


class CacheBackend(ABC):
    """The base of a cache backend, as the engine calls it."""

    def __init__(self, config: Any) -> None:
        self.config, self.enabled = config, False

    @abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


class Config:
    """An engine's configuration: its own fields, and what it does not know."""

    def __init__(self, own: dict[str, Any], **more: Any) -> None:
        self.__dict__.update({"rel_l1_thresh": None, "coefficients": None, **own})
        self._extra_params = more


@contextmanager
def stand_in() -> Iterator[None]:
    """Within it the engine's modules can be imported."""
    names = (
        "vllm_omni",
        "vllm_omni.diffusion",
        "vllm_omni.diffusion.cache",
        "vllm_omni.diffusion.cache.base",
        "vllm_omni.diffusion.worker",
        "vllm_omni.diffusion.worker.diffusion_model_runner",
    )
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules[names[3]].CacheBackend = CacheBackend  # type: ignore[attr-defined]
    modules[names[5]].get_cache_backend = unknown  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def unknown(name: str | None, config: Any) -> Any:
    """The engine's own selector."""
    if name in (None, "none"):
        return None
    raise ValueError(f"Unsupported cache backend: {name}")
