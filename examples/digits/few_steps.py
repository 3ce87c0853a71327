"""Placement by timestep, the corrector and the predictors, on the trained model.

Run from the repository root: python -m examples.digits.few_steps
It prints a Markdown table for each timestep shift: the mean over the samples of the PSNR in dB to
their own uncached pictures. No seed here was used to choose anything.
"""

import argparse
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: make the repository root importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import dit_cache_fx
from examples.digits import checkpoint
from examples.digits.sampling import Model, guided, start

STEPS = 50
COMPUTED = (7, 10, 15, 25)
SYSTEMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "TaylorCache, order 2, even indexes": ("taylorcache", {}),
    "TaylorCache, order 2": ("taylorcache", {}),
    "TaylorCache, order 1, corrector 0.5": ("taylorcache", {"max_order": 1, "corrector": 0.5}),
    "TaylorCache, order 2, corrector 0.5": ("taylorcache", {"corrector": 0.5}),
    "the same, axis timestep": ("taylorcache", {"corrector": 0.5, "axis": "timestep"}),
    "NewtonCache, corrector 0.5": ("newtoncache", {"corrector": 0.5}),
    "HiCache": ("hicache", {}),
    "FoCa": ("foca", {}),
    "Exponential": ("exponential", {}),
}


def shifted(shift: float) -> list[float]:
    """The times of the steps, and 0 behind them, as pipelines with a timestep shift place them."""
    even = [1 - k / STEPS for k in range(STEPS + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@torch.inference_mode()
def pictures(model: Model, times: list[float], samples: int, seed: int, guide: bool) -> Tensor:
    """Euler's method: pictures [B, 1, 8, 8] in [-1, 1]."""
    x, labels = start(samples, seed)
    velocity = guided(model, labels) if guide else None
    for now, then in pairwise(times):
        time = torch.full((samples,), now)
        slope = model(x, time, labels) if velocity is None else velocity(x, now)
        x = x + (then - now) * slope
    return x.clamp(-1, 1)


def placed(name: str, computed: int) -> dict[str, Any]:
    """Which steps a system computes."""
    if not name.endswith("even indexes"):
        return {"computed_steps": computed}
    return {"no_cache_steps": {round(i * (STEPS - 1) / (computed - 1)) for i in range(computed)}}


def row(model: nn.Module, name: str, times: list[float], target: Tensor, **given: Any) -> str:
    """A line of the table."""
    strategy, options = SYSTEMS[name]
    cells = []
    for computed in COMPUTED:
        steps = placed(name, computed)
        cached = dit_cache_fx.apply(model, strategy, timesteps=times[:-1], **options, **steps)
        error = (pictures(cached, times, **given) - target).square().flatten(1).mean(1)
        cells.append(f"{(10 * torch.log10(4 / error)).mean():.1f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=40, help="digits to generate for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(101,))
    parser.add_argument("--shifts", type=float, nargs="+", default=(1, 3, 5))
    parser.add_argument("--guided", action="store_true", help="with classifier-free guidance")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    model = checkpoint.load()
    for seed in options.seeds:
        for shift in options.shifts:
            given = {"samples": options.samples, "seed": seed, "guide": options.guided}
            times = shifted(shift)
            target = pictures(model, times, **given)
            print(f"\nSeed {seed}, shift {shift:g}, {STEPS} steps; computed:\n")
            print("| | " + " | ".join(map(str, COMPUTED)) + " |\n|---" + "|---" * 4 + "|")
            for name in SYSTEMS:
                print(row(model, name, times, target, **given), flush=True)


if __name__ == "__main__":
    main()
