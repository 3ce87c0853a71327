"""Step caching on a trained model: the same digits from every strategy, measured.

Run from the repository root: python -m examples.digits.demo
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

if not __package__:  # run as a file: make the repository root importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.digits import checkpoint, picture, table
from examples.digits.remarks import remark
from examples.digits.running import SEED, Run, run
from examples.digits.systems import Comparison, Section, System
from examples.flow.sampling import ignore, start

REFERENCE_STEPS = 400
OUT = Path(__file__).with_name("out") / "demo.png"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="steps of the uncached sampler")
    parser.add_argument("--shift", type=float, default=3, help="of the timesteps, as in pipelines")
    parser.add_argument("--samples", type=int, default=20, help="digits to generate (10 or more)")
    parser.add_argument("--threshold", type=float, default=0.2, help="of the dynamic TeaCache")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of NewtonCache")
    parser.add_argument("--threads", type=int, default=1, help="1: seconds are then wall seconds")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the picture")
    return parser.parse_args()


def measure_all(plan: list[Section], model: nn.Module, samples: int) -> list[list[Run]]:
    """The runs of every section, under one progress bar."""
    every = [system for section in plan for system in section.systems]
    run(System("warm-up", every[0].sampler, every[0].at[:4]), model, samples, ignore)
    with tqdm(
        total=sum(system.steps for system in every), unit="step", leave=False, disable=None
    ) as progress:

        def measure(system: System) -> Run:
            progress.set_description(system.name)
            return run(system, model, samples, lambda _: progress.update())

        return [[measure(system) for system in section.systems] for section in plan]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    model = checkpoint.load()
    compared = Comparison(options.steps, options.shift)
    base = Section("baseline", [compared.uncached(), compared.reference(REFERENCE_STEPS)])
    plan = [base, *compared.sections(options.threshold, options.tolerance)]
    runs = measure_all(plan, model, options.samples)

    _, labels = start(model, options.samples, SEED)
    target, exact = runs[0]
    judge = table.Judge(target, exact, labels)
    print(
        f"{options.samples} digits, timestep shift {options.shift:g}, "
        f"CPU threads: {options.threads}, ",
        end="",
    )
    print(f"classifier right on {judge.classifier.held_out:.1%} of held-out real digits\n")
    print(table.header(options.steps, REFERENCE_STEPS))
    rows = [[judge.row(one) for one in of_section] for of_section in runs]
    for section, of_section in zip(plan, rows, strict=True):
        print(f"[{section.title}]", *map(table.line, of_section), sep="\n")
    print("\nRead off the table:")
    for section, of_section in zip(plan, rows, strict=True):
        print(remark(section, of_section), end="")

    _, _, ten, _, ten_by_index, _, (last_block, _, near) = runs
    panels = [(plan[2].title, ten), (plan[4].title, ten_by_index)]
    maps = [ten_by_index[-2], ten[-1], near, last_block]
    picture.draw(options.out, target, panels, maps)
    print(f"\npicture: {options.out}   total {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
