"""An inner backend that notes the graphs that it is given and runs them as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class Inner:
    """`graphs`: what was compiled, in order; `calls`: which of these was called, in order."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.calls: list[int] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append(gm)

        def run(*operands: Any) -> Any:
            self.calls.append(number)
            return gm(*operands)

        return run

    def inputs_of(self, number: int) -> list[str]:
        """The names of a graph's inputs."""
        return [str(n.target) for n in self.graphs[number].graph.nodes if n.op == "placeholder"]
