"""Block calls and graph nodes of each tiny pipeline, as a markdown table.

Run: python -m tests.pipelines.table
"""

from __future__ import annotations

import torch
from diffusers.utils import logging

from tests.pipelines.blocks import counted
from tests.pipelines.families import FAMILIES, Family
from tests.pipelines.family import run
from tests.pipelines.session import Session

STEPS = 20
COMPUTED = range(0, STEPS, 4)
HEAD = ("pipeline", "calls a step", "blocks", "block calls without", "with", "nodes", "reused step")


def row(family: Family) -> tuple[object, ...]:
    """The counts of one guided generation, without and with TaylorCache."""
    session = Session(family, "taylorcache", computed=COMPUTED)
    with counted(session.model, family.blocks) as plain, session.uncached():
        run(family, session.pipe, steps=STEPS)
    with session.counts() as cached:
        session.cache(steps=STEPS)
    capture = session.cached.cache_report().captures[0]
    counts = (plain.calls, cached.calls, capture.nodes, capture.nodes_reused)
    return (family.name, family.passes, session.depth, *counts)


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
