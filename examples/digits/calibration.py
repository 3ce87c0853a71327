"""What `calibrate` finds for the digits model: the table of docs/calibration.md.

Run from the repository root: python -m examples.digits.calibration
Calibrated on 20 digits of one seed, measured on 60 digits of two others. Takes a minute or two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import Calibration, NewtonCache, Strategy, TaylorCache
from examples.digits import checkpoint
from examples.flow.model import DiT
from examples.flow.sampling import euler, plain, start, times

STEPS, COMPUTED, SHIFTS = 50, (7, 10, 15, 25), (1.0, 3.0, 5.0)
SEED, OTHER_SEEDS = 7, (101, 102)


@torch.inference_mode()
def digits(model: DiT, at: Sequence[float], samples: int, seed: int) -> Tensor:
    """Digits [B, 1, 8, 8] in [-1, 1], sampled in Euler steps."""
    noise, labels = start(model, samples, seed)
    return euler(plain(model, labels), noise, at)


def calibrated(model: DiT, at: Sequence[float]) -> Calibration:
    """The plans for these timesteps."""
    cached = dit_cache_fx.apply(model, "taylorcache", computed_steps=10)
    runs = [lambda: digits(cached, at, 20, SEED)]
    return dit_cache_fx.calibrate(cached, runs, COMPUTED, progress=False)


def measured(model: DiT, strategy: Strategy, at: Sequence[float]) -> float:
    """What a strategy gives on other samples: the mean of their PSNR in dB."""
    found = []
    for seed in OTHER_SEEDS:
        cached = dit_cache_fx.apply(model, strategy)
        error = digits(cached, at, 30, seed) - digits(model, at, 30, seed)
        errors = error.square().flatten(1).mean(1).clamp_min(1e-12)
        found.append(float((10 * torch.log10(4 / errors)).mean()))
    return sum(found) / len(found)


def main() -> None:
    model = checkpoint.load()
    print("computed of 50:", *COMPUTED)
    for shift in SHIFTS:
        at = times(STEPS, shift)
        begun = time.perf_counter()
        front = calibrated(model, at)
        seconds = time.perf_counter() - begun
        rows: dict[str, list[Strategy]] = {
            "taylorcache": [TaylorCache(computed_steps=k, timesteps=at[:-1]) for k in COMPUTED],
            "newtoncache": [NewtonCache(computed_steps=k, timesteps=at[:-1]) for k in COMPUTED],
            "the plan": [front.plan(computed=k) for k in COMPUTED],
        }
        for name, strategies in rows.items():
            print(
                f"shift {shift:g}: {name}", *(f"{measured(model, s, at):.1f}" for s in strategies)
            )
        print(f"shift {shift:g}: calibrated in {seconds:.0f} s")


if __name__ == "__main__":
    main()
