"""The schedules by quality against plain sampling with as many steps, on the trained model.

Run from the repository root: python -m examples.digits.presets
It prints the Markdown table of docs/schedules.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a file: make the repository root importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import dit_cache_fx
from dit_cache_fx.strategies.schedule import PRESETS
from examples.digits import checkpoint
from examples.digits.sampling import Sampler, adams_bashforth2, euler, guided, ignore, start
from examples.digits.table import psnr

RUNS = (20, 30, 50)  # steps of a generation
CHOSEN_ON, HELD_OUT = 11, 23  # seeds: the presets were chosen on one, the other not looked at


@dataclass(frozen=True)
class LateSteps(dit_cache_fx.Schedule):
    """As many steps as `EvenSteps` computes, denser towards the end: another that was tried."""

    ratio: float
    bend: float = 1.2

    def computes(self, step: int, num_steps: int | None) -> bool:
        even = dit_cache_fx.EvenSteps(self.ratio)
        if num_steps is None:
            return even.computes(step, None)
        count = sum(even.computes(i, num_steps) for i in range(num_steps))
        places = (num_steps * (1 - (1 - i / count) ** self.bend) for i in range(count))
        return step in {round(place) for place in places}


@dataclass(frozen=True)
class Digits:
    """The digits of one seed."""

    model: nn.Module
    samples: int
    seed: int

    @torch.inference_mode()
    def plain(self, sampler: Sampler, steps: int) -> Tensor:
        """Pictures [B, 1, 8, 8] without a cache."""
        noise, labels = start(self.samples, self.seed)
        return sampler(guided(self.model, labels), noise, steps, ignore)

    @torch.inference_mode()
    def cached(self, steps: int, schedule: str | dit_cache_fx.Schedule) -> tuple[Tensor, int]:
        """Pictures by Euler's method with a cache, and how many steps were computed."""
        noise, labels = start(self.samples, self.seed)
        cached = dit_cache_fx.apply(
            self.model, strategy="taylorcache", schedule=schedule, num_steps=steps
        )
        pictures = euler(guided(cached, labels), noise, steps, ignore)
        return pictures, cached.cache_report().steps_computed


def row(digits: Digits, steps: int, preset: str, target: Tensor, placements: bool) -> list[str]:
    """A line of the table: PSNR in dB to the uncached pictures."""
    pictures, computed = digits.cached(steps, preset)
    plain = [digits.plain(sampler, computed) for sampler in (euler, adams_bashforth2)]
    scores = [psnr(p, target) for p in (*plain, pictures)]
    cells = [f"{score:.1f}" for score in scores[:2]] + [f"**{scores[2]:.1f}**"]
    ratio = computed / steps
    for kind in (dit_cache_fx.EvenSteps, LateSteps) if placements else ():
        other, count = digits.cached(steps, kind(ratio))
        cells.append(f"{psnr(other, target):.1f} ({count})")
    return [f'`"{preset}"`', str(steps), str(computed), *cells]


HEADER = ["preset", "steps", "computed", "Euler, as many", "Adams-Bashforth 2, as many", "cached"]
PLACEMENTS = ["even, without the last", "denser at the end"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20, help="digits to generate for each seed")
    parser.add_argument("--runs", type=int, nargs="+", default=RUNS, help="steps of a generation")
    parser.add_argument("--seeds", type=int, nargs="+", default=(CHOSEN_ON, HELD_OUT))
    parser.add_argument("--placements", action="store_true", help="also try other placements")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    model = checkpoint.load()
    header = HEADER + PLACEMENTS if options.placements else HEADER
    rows = len(options.seeds) * len(options.runs) * len(PRESETS)
    with tqdm(total=rows, unit="row", leave=False, disable=None) as progress:
        for seed in options.seeds:
            digits = Digits(model, options.samples, seed)
            print(f"\nSeed {seed}, {options.samples} digits:\n")
            print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
            for steps in options.runs:
                target = digits.plain(euler, steps)
                for preset in PRESETS:
                    cells = row(digits, steps, preset, target, options.placements)
                    print("| " + " | ".join(cells) + " |", flush=True)
                    progress.update()


if __name__ == "__main__":
    main()
