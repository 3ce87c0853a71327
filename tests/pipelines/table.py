"""Block calls, graph nodes and milliseconds of each tiny pipeline, as a markdown table.

Run: python -m tests.pipelines.table
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from diffusers.utils import logging

from tests.pipelines.blocks import counted
from tests.pipelines.families import FAMILIES, Family
from tests.pipelines.family import run
from tests.pipelines.session import Session

STEPS = 20
COMPUTED = range(0, STEPS, 4)
HEAD = (
    "pipeline",
    "transformer calls a step",
    "blocks",
    "block calls without",
    "with",
    "nodes captured",
    "nodes of a reused step",
    "step without, ms",
    "reused step, ms",
)


def row(family: Family) -> tuple[object, ...]:
    """The counts of one guided generation, without and with TaylorCache."""
    session = Session(family, "taylorcache", computed=COMPUTED)
    with counted(session.model, family.blocks) as plain, session.uncached():
        run(family, session.pipe, steps=STEPS)
    with session.counts() as cached:
        session.cache(steps=STEPS)
    capture = session.cached.cache_report().captures[0]
    counts = (plain.calls, cached.calls, capture.nodes, capture.nodes_reused)
    return (family.name, family.passes, session.depth, *counts, *times(family))


def times(family: Family) -> tuple[str, str]:
    """Milliseconds of a whole step of the pipeline: without a cache, and where it is reused."""
    session = Session(family, "taylorcache", computed={0})
    with session.uncached():
        plain = of_a_step(lambda steps: run(family, session.pipe, steps=steps))
    return f"{plain:.1f}", f"{of_a_step(lambda steps: session.cache(steps=steps)):.1f}"


def of_a_step(generate: Callable[[int], object]) -> float:
    """Milliseconds by which each of the later steps makes a generation longer."""

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        generate(steps)
        return time.perf_counter() - began

    generate(STEPS)
    best = {steps: min(seconds(steps) for _ in range(5)) for steps in (2, STEPS)}
    return 1e3 * (best[STEPS] - best[2]) / (STEPS - 2)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    print(f"{STEPS} steps, guided; computed: {', '.join(map(str, COMPUTED))}\n")
    print(f"| {' | '.join(HEAD)} |")
    print("|" + "---|" * len(HEAD))
    for family in FAMILIES:
        print(f"| {' | '.join(map(str, row(family)))} |")


if __name__ == "__main__":
    main()
