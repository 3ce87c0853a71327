"""A strategy of your own in one small class, compared with the built-in ones on a trained model.

Run: python examples/own_strategy.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import Clock, DeepCache, Strategy, TaylorCache

if not __package__:  # run as a file: make the repository root importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from examples.digits import checkpoint
from examples.digits.table import psnr
from examples.flow.sampling import euler, guided, start, times

STEPS = 50
COMPUTED = range(0, STEPS, 5)


@dataclass(frozen=True, kw_only=True)
class DampedLine(Strategy):
    """Goes on along the line through the last two computed values, a share `damping` of the way."""

    damping: float = 0.9

    name: ClassVar[str] = "dampedline"
    action: ClassVar[str] = "predicted"

    def slots(self) -> int:
        return 2  # the newest value, and its change per step

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        two_values = (clock.computed > 0) & (clock.distance > 0)
        steps = torch.where(two_values, clock.distance, torch.inf)  # no change known: 0
        return [value, (value - cached[0]) / steps]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        value, change = cached
        return value + self.damping * clock.distance * change


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)  # the model is too small for more
    model = checkpoint.load()
    noise, labels = start(model, samples=10, seed=0)
    target = euler(guided(model, labels), noise, times(STEPS))
    strategies = [
        DeepCache(no_cache_steps=COMPUTED),
        TaylorCache(no_cache_steps=COMPUTED, max_order=1),
        DampedLine(no_cache_steps=COMPUTED, damping=0.5),
        DampedLine(no_cache_steps=COMPUTED, damping=0.9),
    ]
    for strategy in strategies:
        cached = dit_cache_fx.apply(model, strategy)
        pictures = euler(guided(cached, labels), noise, times(STEPS))
        report = cached.cache_report()
        what = f"{strategy.name} {getattr(strategy, 'damping', '')}"
        print(
            f"{what:16} {report.steps_computed} of {STEPS} steps computed, "
            f"{psnr(pictures, target):.1f} dB from the uncached pictures"
        )


if __name__ == "__main__":
    main()
