"""Turn a trace into a `Program`: live parameters, `call_module` nodes, separate guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx.capture.data_guards import READS, read_count, read_list, read_shape
from dit_cache_fx.capture.signature import FlatCall
from dit_cache_fx.capture.trace import Trace, call_leaf
from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.graph_module import graph_module
from dit_cache_fx.ir.graph_text import short
from dit_cache_fx.ir.names import unreserved
from dit_cache_fx.ir.node_meta import mark, meta_of
from dit_cache_fx.ir.nodes import ancestors, inputs_behind, is_exposed, is_kept
from dit_cache_fx.ir.program import Program

# without autograd and in-place operations these return their argument
_IDENTITIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_COPY = torch.ops.aten.lift_fresh_copy.default


@dataclass(frozen=True)
class Guards:
    """The values that the captured code read from tensors: `gm(*inputs)` returns them again.

    Values must be equal; shapes (sizes of masked selections) may differ after a check of the graph.
    """

    gm: fx.GraphModule
    expected: tuple[Any, ...]  # a torch.Size for each shape
    inputs: tuple[int, ...]  # the call's tensors that they depend on

    def described(self, read: Sequence[Any]) -> list[str]:
        """Return descriptions of the reads, with the values in `read`."""
        nodes = data_reads(self.gm.graph)
        return [
            f"{_reading(n)}: {short([*value] if isinstance(value, torch.Size) else value)}"
            for n, value in zip(nodes, read, strict=True)
        ]

    def hold(self, read: Sequence[Any]) -> bool:
        """Return whether the reads are those of the capture, except for shapes."""
        return self.values(read) == self.values(self.expected)

    def values(self, read: Sequence[Any]) -> list[Any]:
        """Return the reads that must be equal."""
        return [v for v in read if not isinstance(v, torch.Size)]

    def shapes(self, read: Sequence[Any]) -> tuple[torch.Size, ...]:
        """Return the reads that may differ after a check."""
        return tuple(v for v in read if isinstance(v, torch.Size))


def data_reads(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that read a value or a shape from a tensor's data, in order."""
    return [node for node in graph.nodes if node.target in READS]


def no_guards(program: Program) -> Guards:
    """Return the guards of a program that reads no values."""
    graph = fx.Graph()
    for name in program.inputs:
        graph.placeholder(name)
    graph.output([])
    return Guards(graph_module(program.model, {}, graph, "Guards"), (), ())


def normal_form(
    model: nn.Module, traced: Trace, call: FlatCall, timestep_argument: str | None
) -> tuple[Program, Guards | None]:
    """Return a trace's program and guards. Raises `CaptureError` if a guard needs a block."""
    names, arguments = call.names(), call.arguments_of()
    attributes: dict[str, Any] = {}
    graph = _rewrite(model, traced, names, attributes)
    guards = _split_guards(model, graph, attributes, traced.read)
    gm = graph_module(model, attributes, graph, "Captured")
    gm.graph.eliminate_dead_code(is_kept)
    gm.recompile()
    inputs = tuple(_inputs(gm))
    named = dict(zip(reversed(arguments), reversed(inputs), strict=True))
    program = Program(
        gm=gm,
        inputs=inputs,
        arguments=tuple(arguments),
        timestep_argument=timestep_argument,
        timestep_input=None if timestep_argument is None else named[timestep_argument],
        sample=None,
        output=traced.output,
    )
    return program, guards


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.find_nodes(op="placeholder")]


def _rewrite(
    model: nn.Module, traced: Trace, names: Sequence[str], attributes: dict[str, Any]
) -> fx.Graph:
    graph = fx.Graph()
    places = traced.gm.graph.find_nodes(op="placeholder")
    given = {n: _placeholder(graph, n, name) for n, name in zip(places, names, strict=True)}
    new = translated(model, traced, graph, attributes, given, set(body(traced.gm.graph)))
    output = traced.gm.graph.output_node()
    graph.output(fx.map_arg(output.args[0], new.__getitem__))
    return graph


def _placeholder(graph: fx.Graph, traced: fx.Node, name: str) -> fx.Node:
    """Add an input; its name is a unique identifier and not reserved for the cache's operands."""
    node = add_input(graph, traced, unreserved(name))
    node.target = node.name
    return node


def translated(
    model: nn.Module,
    traced: Trace,
    graph: fx.Graph,
    attributes: dict[str, Any],
    given: dict[fx.Node, fx.Node],
    needed: set[fx.Node],
) -> dict[fx.Node, fx.Node]:
    """Add the `needed` nodes of a trace to `graph`, in normal form; `given` exist already.

    Constants are added to `attributes`. Returns the new node of each.
    """
    new = dict(given)
    live = _live_tensors(model)
    named = {node.name: node for node in traced.gm.graph.nodes}

    def translation(node: fx.Node) -> fx.Node:
        if node.target in _IDENTITIES or (node.target is _COPY and not is_exposed(node)):
            return new[node.all_input_nodes[0]]
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
        if node.op == "get_attr":
            made = graph.get_attr(_attribute(traced.gm, node, live, attributes))
        elif node.target is call_leaf:
            _, name, args, kwargs = args
            made = graph.call_module(f"model.{name}", args, kwargs)
        else:
            name = unreserved(node.name)
            made = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        made.meta.update(node.meta)
        parts = [named[part] for part in meta_of(node).parts or ()]
        _name_parts(made, [new[part] for part in parts if part in new])
        return made

    copy_nodes(graph, [n for n in traced.gm.graph.nodes if n in needed], new, translation)
    return new


def _name_parts(call: fx.Node, parts: Sequence[fx.Node]) -> None:
    mark(call, parts=tuple(part.name for part in parts) or None)
    for part in parts:
        mark(part, part=True)


def _attribute(
    gm: fx.GraphModule, node: fx.Node, live: dict[int, str], attributes: dict[str, Any]
) -> str:
    """Return the live name of a tensor that the model owns; any other value becomes a constant."""
    value = getattr(gm, str(node.target))
    if id(value) in live:
        return f"model.{live[id(value)]}"
    for name, known in attributes.items():
        if known is value:
            return name
    name = f"_constant_{len(attributes)}"
    attributes[name] = value
    return name


def _live_tensors(model: nn.Module) -> dict[int, str]:
    """Return id -> attribute path of each tensor that a module owns."""
    found: dict[int, str] = {}
    for name, value in owned_tensors(model):
        found.setdefault(id(value), name)
    return found


def owned_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor that a module owns with its attribute path, plain attributes included."""
    for prefix, module in model.named_modules():
        for items in (module._parameters, module._buffers, vars(module)):
            for name, value in items.items():
                if isinstance(value, torch.Tensor):
                    yield f"{prefix}.{name}" if prefix else name, value


def _reading(node: fx.Node) -> str:
    """Describe a guard's read and its inputs."""
    inputs = sorted(n.name for n in inputs_behind(node))
    what = _WHAT.get(node.target) or str(node.args[0])
    return f"{what} of {', '.join(inputs) or 'a constant'}"


#: descriptions of guards that do not read the result of an operator
_WHAT: dict[Any, str] = {
    read_list: "values",
    read_count: "count of true values",
    read_shape: "shape that depends on values",
}


def _split_guards(
    model: nn.Module, graph: fx.Graph, attributes: dict[str, Any], read: Sequence[Any]
) -> Guards | None:
    reads = data_reads(graph)
    if not reads:
        return None
    needed = ancestors(reads)
    apart = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    inputs = graph.find_nodes(op="placeholder")
    copy_nodes(apart, [*inputs, *(n for n in graph.nodes if n in needed)], new)
    apart.output(tuple(new[node] for node in reads))
    for node in reads:
        graph.erase_node(node)
    gm = graph_module(model, attributes, apart, "Guards")
    return Guards(gm, tuple(read), tuple(i for i, n in enumerate(inputs) if n in needed))
