"""Run the checks and write `docs/support.md`: `python -m tests.support.table`.

`--check` compares with the page instead, and fails if it differs. This takes at least a quarter of
an hour, mostly for compilation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import torch

from tests.support.case import SupportCase
from tests.support.checks import EAGER, YES, look, look_further
from tests.support.classes import OUTSIDE, SUPPORT

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
COLUMNS = (
    "class",
    "cached blocks",
    *EAGER,
    "TeaCache, TaylorCache",
    "`torch.compile`",
    "`compile_steps`",
    "`backend()`",
)

INTRODUCTION = """\
# Supported models

Every transformer class that diffusers exports, as a tiny model with random weights: six steps, of
which 0, 1 and 3 are computed. `python -m tests.support.table` runs the checks and writes this page.

{versions}

- **cached blocks**: their number and their lists. They were found without `blocks=`, and without
  `timestep=` unless a cell names it.
- **computed steps bitwise**: a computed step returns bitwise what the model returns.
- **reused steps skip blocks**: no cached block runs on a reused step; on a computed step each runs
  as often as in the model.
- **equals per-block cache**: with DeepCache, every step is bitwise that of a model whose blocks are
  cached one by one.
- **TeaCache, TaylorCache**: both run, and their computed steps are bitwise those of the model.
- **`torch.compile`**: `torch.compile(cached, fullgraph=True)` makes one graph for all steps and
  gives the same results. The backend runs the graph as it is.
- **`compile_steps`**: `cached.compile_steps()` gives the same results.
- **`backend()`**: `torch.compile(model, backend=dit_cache_fx.backend(...))` with
  `inner="aot_eager"` caches the model and gives the same results within 1e-5.

"""


def row(case: SupportCase) -> list[str]:
    """The cells of one class; "-" after an error."""
    seen, cells = look(case)
    if seen is not None:
        cells = [*cells, *look_further(seen)]
    return [case.name, *cells, *["-"] * (len(COLUMNS) - 1 - len(cells))]


def page(rows: Iterable[list[str]]) -> str:
    """The page; what is longer than a cell is a note below the table."""
    rows = list(rows)
    texts = sorted({cell for cells in rows for cell in cells[2:] if len(cell) > len(YES)})
    lines = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    lines += [line(_noted(cell, texts) for cell in cells) for cells in rows]
    notes = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
    whole = [c for c in rows if all(cell == YES for cell in c[2:])]
    count = f"{len(whole)} of {len(rows)} classes pass in every column."
    outside = [f"- `{name}`: {reason}" for name, reason in OUTSIDE.items()]
    parts = [*lines, "", count, "", *notes, "", "Classes without a row:", "", *outside]
    return INTRODUCTION.format(versions=versions()) + "\n".join(parts) + "\n"


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _noted(cell: str, texts: list[str]) -> str:
    return f"{cell.split()[0].rstrip(',:')} ({texts.index(cell) + 1})" if cell in texts else cell


def versions() -> str:
    """The versions that the page is about."""
    return f"torch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}, on a CPU."


def rows_on(text: str) -> dict[str, list[str]]:
    """The cells of each class on a page."""
    lines = text[text.index("| class |") :].splitlines()
    tabled = [[c.strip() for c in at[1:-1].split("|")] for at in lines if at[:1] == "|"]
    return {cells[0]: cells[1:] for cells in tabled[2:]}


def _measured(case: SupportCase) -> list[str]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return row(case)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for cells in pool.map(_measured, SUPPORT):
            rows.append(cells)
            print(line(cells), flush=True)
    text = page(rows)
    if not options.check:
        PAGE.write_text(text)
        return 0
    same = PAGE.read_text() == text
    print("the page says the same" if same else "the page says something else")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(_main())
