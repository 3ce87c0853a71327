"""How many rows go into one graph: a few sizes, whatever number of requests there are."""

from __future__ import annotations

import random

import pytest
import torch

from dit_cache_fx import DeepCache, TaylorCache
from dit_cache_fx.runtime.batch.row_steps import sizes
from tests.runtime.batch.serving import Serving
from tests.toys import ToyDiT, make


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, []), (1, [1]), (2, [2]), (3, [2, 1]), (5, [4, 1]), (6, [4, 2]), (7, [8]), (11, [8, 2, 1]),
     (13, [16]), (16, [16])],
)  # fmt: skip
def test_sizes(rows: int, expected: list[int]) -> None:
    assert sizes(rows) == expected


@pytest.mark.parametrize("rows", range(1, 65))
def test_at_most_a_quarter_is_added(rows: int) -> None:
    assert rows <= sum(sizes(rows)) <= 1.25 * rows
    assert all(size & (size - 1) == 0 for size in sizes(rows))


def churn(serving: Serving, ticks: int, seed: int) -> None:
    """On each tick another number of requests, from 1 to all."""
    draw = random.Random(seed)
    for _ in range(ticks):
        requests = [*range(len(serving.sessions))]
        draw.shuffle(requests)
        serving.step(*requests[: draw.randint(1, len(requests))])


def test_graphs_are_one_for_each_power_of_two() -> None:
    """1 to 16 rows at a time; the first is the graph of one row."""
    serving = Serving(make(ToyDiT), TaylorCache(no_cache_steps={0, 2, 4}), requests=16)
    churn(serving, ticks=20, seed=0)
    counts = {entry.layout.count for entry in entries(serving) if entry.layout is not None}
    assert counts <= {2, 4, 8, 16}
    assert len(entries(serving)) <= 5
    before = len(entries(serving))
    churn(serving, ticks=10, seed=1)
    assert len(entries(serving)) == before
    assert min(serving.same_counts()) > 20


def test_what_is_compiled_is_bounded() -> None:
    """compile_steps: for each size a graph of either kind of step; none of them twice."""
    torch._dynamo.utils.counters.clear()
    serving = Serving(
        make(ToyDiT),
        DeepCache(no_cache_steps={0, 2, 4}),
        requests=16,
        ready=lambda cached: cached.compile_steps(backend="eager") or cached,
    )
    churn(serving, ticks=12, seed=2)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 4 < compiled <= 10
    churn(serving, ticks=8, seed=3)
    more = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    assert more <= 10 - compiled
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled + more


def entries(serving: Serving) -> list:  # type: ignore[type-arg]
    return serving.cached._engine.graphs.all()
