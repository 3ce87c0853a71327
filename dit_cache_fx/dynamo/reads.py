"""Values that Dynamo's graph reads from tensors (`.item()`): read them before the graph runs.

Each graph of the cache is for certain values, as for certain shapes. A value that changes with the
steps, such as the timestep's, stays a tensor of no dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import dynamo_source, dynamos_tensor
from dit_cache_fx.dynamo.outline import outer_member
from dit_cache_fx.dynamo.sources import Path, module_calls, path_of
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.copying import copy_nodes
from dit_cache_fx.ir.nodes import ancestors, inputs_behind
from dit_cache_fx.values.random_state import RandomState

_IN_PLACE = (
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
)


def as_number(tensor: torch.Tensor) -> torch.Tensor:
    """Return a one-element tensor as one of no dimensions, which acts like its number."""
    dtype = torch.float64 if tensor.is_floating_point() else torch.int64
    return tensor.reshape(()).to(dtype)


class Reads:
    """A graph from the inputs of Dynamo's graph to the values that are read from tensors."""

    def __init__(self, gm: fx.GraphModule, count: int) -> None:
        self.gm = gm
        self.count = count
        self.random: bool | None = None  # whether it draws random numbers, once known

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the values, except random ones. Waits for the device."""
        if self.random is None:
            drawn = RandomState.now([v for v in inputs if isinstance(v, torch.Tensor)])
            with drawn.again():
                self._run(inputs)
                self.random = drawn.used()
        return [None] * self.count if self.random else self._run(inputs)

    def _run(self, inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return list(self.gm(*inputs))


def cut(
    gm: fx.GraphModule, numbers: Collection[fx.Node], timestep: fx.Node | None
) -> tuple[fx.GraphModule, Reads | None]:
    """Split Dynamo's graph into one that takes the read values, and one that reads them.

    Before:

        %sum = sum(%mask)
        %item = item(%sum)
        %h = mul(%x, %item)

    After, the graph and the one that reads:

        %read_0 = placeholder                               %sum = sum(%mask)
        %h = mul(%x, %read_0)                               %item = item(%sum)

    Values that depend on the `timestep` become `as_number(...)`. `numbers`: inputs that are numbers
    anyway. Reads from a block's result remain in the graph.
    """
    members = {c.path for n in gm.graph.nodes if (c := outer_member(module_calls(n))) is not None}
    found = [n for n in reads_of(gm.graph) if n.args[0] not in numbers]
    found = [n for n in found if _is_before_blocks(n, members) and not _is_after_change(n)]
    moving = [n for n in found if timestep is not None and timestep in ancestors([n])]
    apart = [n for n in found if n not in moving]
    if not found:
        return gm, None
    return _given(gm, apart, moving), Reads(_reading(gm, apart), len(apart)) if apart else None


def reads_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that read the value of a tensor."""
    return list(graph.find_nodes(op="call_method", target="item"))


def _is_before_blocks(node: fx.Node, members: Collection[Path]) -> bool:
    """Return whether the node needs no weight of a block."""
    sources = [path_of(dynamo_source(n)) for n in inputs_behind(node)]
    return not any(source[: len(path)] == path for source in sources for path in members)


def _is_after_change(node: fx.Node) -> bool:
    """Return whether a node before it changes a tensor in place: it may be the one that is read."""
    for other in node.graph.nodes:
        if other is node:
            return False
        if other.op == "call_function" and other.target in _IN_PLACE:
            return True
        name = str(other.target if other.op == "call_method" else _name(other))
        if name.endswith("_") and not name.endswith("__"):
            return True
    return False


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _given(gm: fx.GraphModule, apart: list[fx.Node], moving: list[fx.Node]) -> fx.GraphModule:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    places = gm.graph.find_nodes(op="placeholder")

    def number(node: fx.Node) -> fx.Node | None:
        if node not in moving:
            return None
        made = graph.call_function(as_number, (new[node.all_input_nodes[0]],))
        made.meta.update(node.meta)
        return made

    copy_nodes(graph, places, new)
    new.update((node, graph.placeholder(f"read_{i}")) for i, node in enumerate(apart))
    copy_nodes(graph, gm.graph.nodes, new, number)
    return fx.GraphModule(gm, graph)


def _reading(gm: fx.GraphModule, reads: list[fx.Node]) -> fx.GraphModule:
    graph, new, needed = fx.Graph(), dict[fx.Node, fx.Node](), ancestors(reads)
    copy_nodes(graph, [n for n in gm.graph.nodes if n in needed or n.op == "placeholder"], new)
    graph.output([new[node] for node in reads])
    return fx.GraphModule(gm, graph)


class Checked(fx.Interpreter):
    """Runs Dynamo's graph with tensors in the place of numbers.

    Refuses it if that changes the dtype of a result.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        made = torch.tensor if target is dynamos_tensor() else target
        return super().call_function(made, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        result, wanted = super().run_node(node), node.meta.get("example_value")
        if isinstance(result, torch.Tensor) and isinstance(wanted, torch.Tensor):
            _refuse_other_dtype(node, result, wanted)
        return result


def _refuse_other_dtype(node: fx.Node, result: torch.Tensor, wanted: torch.Tensor) -> None:
    if result.dtype != wanted.dtype:
        raise CaptureError(f"{node} is {result.dtype} if the timestep is no number")
