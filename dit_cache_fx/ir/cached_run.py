"""The node that stands for a cached run, once the passes have made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx


def cache_or_compute(
    run: int,
    compute: fx.GraphModule,
    reuse: fx.GraphModule,
    run_inputs: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """The values of cached run `run`, computed or reused; a lowering says how it is decided.

    `compute(*cached, *clock, *run_inputs, *operands)` gives the values, then what to cache.
    `reuse(*cached, *clock, *run_inputs)` gives the values.
    """
    raise AssertionError("a program has to be lowered before it runs")


@dataclass(frozen=True)
class CachedRun:
    """The arguments of a `cache_or_compute` node, by name."""

    node: fx.Node
    index: int
    compute: str  # attribute names of the two sides
    reuse: str
    run_inputs: list[fx.Node]
    operands: list[fx.Node]

    @staticmethod
    def of(node: fx.Node) -> CachedRun:
        index, compute, reuse, run_inputs, operands = cast("tuple[Any, ...]", node.args)
        return CachedRun(
            node, index, str(compute.target), str(reuse.target), list(run_inputs), list(operands)
        )


def cached_runs(graph: fx.Graph) -> list[CachedRun]:
    """The cached runs of a graph, in order."""
    return [CachedRun.of(n) for n in graph.find_nodes(op="call_function", target=cache_or_compute)]


def is_cached_run(node: fx.Node) -> bool:
    """Whether it is a `cache_or_compute` node."""
    return node.target is cache_or_compute
