"""Pass 1: compute small values that depend on no input once, not on every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import without_dispatch_modes
from dit_cache_fx.capture.ambient import without_autocast
from dit_cache_fx.ir.copying import copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.nodes import is_exposed, is_kept, is_view, spec_of, tensor_spec
from dit_cache_fx.ir.program import Program
from dit_cache_fx.strategies import Strategy

#: in bytes. torch divides larger tensors among threads, and then the last bit of an element may
#: depend on the number of threads
_LARGEST = 1 << 14

_TO_COPY = torch.ops.aten._to_copy.default


def fold_constants(program: Program, strategy: Strategy) -> None:
    """Replace a value that depends on no input by a constant of the graph.

    Before:

        %i = aten.arange(0, 128)
        %f = aten.exp(aten.mul(%i, -0.07))     # the frequencies of the timestep embedding
        %a = aten.mul(%timestep, %f)

    After:

        %f = get_attr[constant_f]
        %a = aten.mul(%timestep, %f)

    Only elementwise operators of ATen are computed in advance, and nothing that the model returns
    or passes to a module, which might change it in place. The model's weights are inputs.
    """
    constants = {node: f"constant_{node.name}" for node in _foldable(program.graph)}
    if not constants:
        return
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()

    def constant(node: fx.Node) -> fx.Node | None:
        if node not in constants:
            return None
        made = graph.create_node("get_attr", constants[node], name=node.name)
        made.meta.update(node.meta)
        return made

    copy_nodes(graph, program.graph.nodes, new, constant)
    graph.eliminate_dead_code(is_kept)
    read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    values = _computed({node: name for node, name in constants.items() if name in read})
    attributes = attributes_of(program.gm, graph) | values
    program.gm = graph_module(program.model, attributes, graph, "Folded")


def _foldable(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes with a value that depends on no input and that nothing can change."""
    fixed: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if not is_kept(node) and _is_elementwise(node) and fixed.keys() >= {*node.all_input_nodes}:
            fixed[node] = None
    return [node for node in fixed if not is_view(node) and not is_exposed(node)]


def _is_elementwise(node: fx.Node) -> bool:
    """Return whether each element of the result has the same value in every call.

    A view counts, so that it does not end a chain of such operators.
    """
    operator, spec = node.target, spec_of(node)
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "aten":
        return False
    if spec is None or torch.Tag.nondeterministic_seeded in operator.tags:
        return False
    if tensor_spec(node).nbytes > _LARGEST:
        return False
    made = not node.all_input_nodes
    return made or torch.Tag.pointwise in operator.tags or operator is _TO_COPY or is_view(node)


def _computed(constants: Mapping[fx.Node, str]) -> dict[str, torch.Tensor]:
    """Return the values of these nodes by name."""
    values: dict[fx.Node, torch.Tensor] = {}

    def value(node: fx.Node) -> torch.Tensor:
        if node not in values:
            operator: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = operator(*args, **kwargs)
        return values[node]

    with without_dispatch_modes(), without_autocast(), torch.inference_mode(False), torch.no_grad():
        made = {name: value(node) for node, name in constants.items()}
    for device in {tensor.device for tensor in made.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # other threads read them on other streams
    return made
