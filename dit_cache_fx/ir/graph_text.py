"""Print graphs as readable text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import trace_text
from dit_cache_fx.ir.node_meta import meta_of
from dit_cache_fx.ir.nodes import spec_of

#: longer arguments are cut
_LONGEST = 100


def lines(gm: fx.GraphModule, name: str, indent: str = "", shapes: bool = False) -> Iterator[str]:
    """Yield the graph as text, one line per node; its subgraphs (a run's sides) come first.

    `shapes`: add the dtype and shape of each value, as known at capture.
    """
    nodes = list(gm.graph.nodes)
    for node in nodes:
        side = _value(gm, node)
        if isinstance(side, fx.GraphModule):
            yield from lines(side, str(node.target), indent + "    ", shapes)
    inputs = [str(node) for node in gm.graph.find_nodes(op="placeholder")]
    yield f"{indent}{name}({', '.join(inputs)}):"
    for node in nodes:
        if node.op != "placeholder" and not isinstance(_value(gm, node), fx.GraphModule):
            yield f"{indent}    {_line(node)}{_shape(node) if shapes else ''}"


def trace_graph(name: str, gm: fx.GraphModule) -> None:
    """Add a graph to torch's structured trace, if there is one, as `dit_cache_fx_<name>`."""
    trace_text(f"dit_cache_fx_{name}", lambda: "\n".join(lines(gm, name, shapes=True)))


def ranges(numbers: Iterable[int]) -> str:
    """Format ascending integers: `0-11, 15, 19`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    if node.op == "get_attr":
        return f"{node} = {node.target}"
    named = [f"{key}={short(value)}" for key, value in node.kwargs.items()]
    line = f"{node} = {_target(node)}({', '.join([*map(short, node.args), *named])})"
    within = meta_of(node).within
    return f"with {within}: {line}" if within else line


def _target(node: fx.Node) -> Any:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    return getattr(node.target, "__name__", node.target)


def short(value: object) -> str:
    """Return a value as text, cut to a maximal length."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _shape(node: fx.Node) -> str:
    spec = spec_of(node)
    return "" if spec is None else f"  # {str(spec.dtype).removeprefix('torch.')}{[*spec.shape]}"


def _value(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the value of a `get_attr` node if the graph itself has it."""
    own = node.op == "get_attr" and "." not in str(node.target)
    return getattr(gm, str(node.target), None) if own else None
