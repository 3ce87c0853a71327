"""Models of a few blocks, and what the two processes do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import dit_cache_fx

STEPS = 10
#: every option of a strategy that is tried: a schedule, and the rules that look at values
SCHEDULED: dict[str, dict[str, Any]] = {
    "deepcache": {"no_cache_steps": range(0, STEPS, 3)},
    "taylorcache": {"no_cache_steps": range(0, STEPS, 3)},
}
RULED: dict[str, dict[str, Any]] = {
    "teacache": {"rel_l1_thresh": 0.2},
    "firstblockcache": {"threshold": 0.3},
    "easycache": {"threshold": 0.2, "warmup_steps": 2},
    "taylorcache": {"tolerance": 0.4},
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y = self.norm(x) * (1 + self.modulation(c)[:, None])
        return x + self.down(torch.nn.functional.gelu(self.up(y)))


class Dit(nn.Module):
    """Each token by itself: so its sequence can be split without anything else."""

    def __init__(self, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h, c = self.embed(x) * 2 + 1, self.time(timestep[:, None].to(x.dtype))
        for block in self.blocks:
            h = block(h, c)
        return self.out(h)


def dit(width: int = 16) -> Dit:
    torch.manual_seed(1)
    return Dit(width).eval()


Call = dict[str, torch.Tensor]


def dit_call(step: int, before: torch.Tensor | None) -> Call:
    """A sample that moves as a sampler moves it."""
    x = torch.randn(2, 8, 4) if before is None else before
    return {"x": x, "timestep": torch.full((2,), 1 - step / STEPS)}


class Run(NamedTuple):
    """A generation: what each step gave, and what was done on each."""

    outputs: list[torch.Tensor]
    actions: list[str]
    bytes_held: int


def generate(
    model: Any,
    call: Callable[[int, torch.Tensor | None], Call] = dit_call,
    whole: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    steps: int = STEPS,
) -> Run:
    """An Euler sampler's steps. `call`: makes the arguments, `whole`: of an output."""
    torch.manual_seed(2)
    outputs, sample = [], None
    for step in range(steps):
        arguments = call(step, sample)
        output = model(**arguments)
        output = whole(output[0] if isinstance(output, tuple) else output)
        outputs.append(output)
        first = next(iter(arguments.values()))
        sample = whole(first) - output / steps
    report = model.cache_report() if hasattr(model, "cache_report") else None
    actions = [f"{record.step} {record.action}" for record in report.timeline] if report else []
    return Run(outputs, actions, report.bytes_held if report else 0)


def apart(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest relative difference of any step."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def cached(model: nn.Module, strategy: str, options: dict[str, Any]) -> Any:
    return dit_cache_fx.apply(model, strategy, **options)
