"""The same picture for fewer computed steps: measured on two trained models.

Run from the repository root: python -m examples.few_steps
It writes the figures (results/*.json beside this file), and from them the tables of README.md and
docs/ and the pictures. `--draw` only writes tables and pictures, from the figures that are there.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.few_steps.curves import draw
from examples.few_steps.measure import figures
from examples.few_steps.tables import fill
from examples.few_steps.task import MODELS, Task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = ROOT / "docs" / "pictures"
#: of each seed; the shapes take longer
SAMPLES = {"digits": 20, "shapes": 14}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, help=f"of each seed; {SAMPLES} without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=(211, 212))
    parser.add_argument("--guided", action="store_true", help="with classifier-free guidance")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures are")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


def measure(model: str, samples: int, seeds: Sequence[int], guide: bool, results: Path) -> None:
    """Write the figures of a model."""
    task = Task.of(model, samples, seeds, guide)
    found = figures(task, lambda what: print(f"{model}, {what}", flush=True))
    results.mkdir(exist_ok=True)
    what = {"samples": samples, "seeds": list(seeds), "guided": guide}
    (results / f"{model}.json").write_text(json.dumps(what | found, indent=1) + "\n")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    for model in () if options.draw else options.models:
        samples = options.samples or SAMPLES[model]
        measure(model, samples, options.seeds, options.guided, options.results)
    files = [options.results / f"{model}.json" for model in MODELS]
    if options.results == RESULTS and all(file.exists() for file in files):
        known = {file.stem: json.loads(file.read_text()) for file in files}
        for page in PAGES:
            page.write_text(fill(page.read_text(), known))
        draw(PICTURES / "few_steps.png", known)


if __name__ == "__main__":
    main()
