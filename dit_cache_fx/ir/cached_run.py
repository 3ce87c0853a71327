"""The graph node of a cached run, and access to its arguments by name."""

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
    """Return the values of cached run `run`; a lowering replaces this node by the decision.

    `compute(*cached, *clock, *run_inputs, *operands)` gives the values, then the tensors to cache.
    `reuse(*cached, *clock, *run_inputs)` gives the values.
    """
    raise AssertionError("a program must be lowered before it runs")


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
    """Return whether the node is a `cache_or_compute` node."""
    return node.target is cache_or_compute
