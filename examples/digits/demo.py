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
from examples.digits.sampling import ignore, start
from examples.digits.systems import Section, System, reference, sections, uncached

REFERENCE_STEPS = 400
OUT = Path(__file__).with_name("out") / "demo.png"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="steps of the uncached sampler")
    parser.add_argument("--samples", type=int, default=20, help="digits to generate (10 or more)")
    parser.add_argument("--threshold", type=float, default=0.2, help="of the dynamic TeaCache")
    parser.add_argument("--threads", type=int, default=1, help="1: seconds are then wall seconds")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the picture")
    return parser.parse_args()


def measure_all(plan: list[Section], model: nn.Module, samples: int) -> list[list[Run]]:
    """The runs of every section, under one progress bar."""
    every = [system for section in plan for system in section.systems]
    run(System("warm-up", every[0].sampler, 3), model, samples, ignore)
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
    base = Section("baseline", [uncached(options.steps), reference(REFERENCE_STEPS)])
    plan = [base, *sections(options.steps, options.threshold)]
    runs = measure_all(plan, model, options.samples)

    _, labels = start(options.samples, SEED)
    target, exact = runs[0]
    judge = table.Judge(target, exact, labels)
    print(f"{options.samples} digits, CPU threads: {options.threads}, ", end="")
    print(f"classifier right on {judge.classifier.held_out:.1%} of held-out real digits\n")
    print(table.header(options.steps, REFERENCE_STEPS))
    rows = [[judge.row(one) for one in of_section] for of_section in runs]
    for section, of_section in zip(plan, rows, strict=True):
        print(f"[{section.title}]", *map(table.line, of_section), sep="\n")
    print("\nRead off the table:")
    for section, of_section in zip(plan, rows, strict=True):
        print(remark(section, of_section), end="")

    _, _, ten, seven, _, (last_block, dynamic) = runs
    panels = [(plan[2].title, ten), (plan[3].title, seven)]
    _, _, _, tea, _, taylor2 = ten
    picture.draw(options.out, target, panels, [tea, dynamic, taylor2, last_block])
    print(f"\npicture: {options.out}   total {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
