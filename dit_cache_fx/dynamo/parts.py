"""Prepare lowered graphs for the inner compiler: flat, and compiled on their first call."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import (
    emit_autocast,
    emit_end_of_autocast,
    like_dynamos,
    use_attention_backends,
)
from dit_cache_fx.capture.ambient import without_autocast
from dit_cache_fx.dynamo.inner import Compile
from dit_cache_fx.ir.copying import add_input, body, copy_nodes
from dit_cache_fx.ir.node_meta import meta_of
from dit_cache_fx.ir.within import Within
from dit_cache_fx.lowering import CompiledPart, Part
from dit_cache_fx.values.tensor_spec import TensorSpec


class _AtFirstCall:
    """Compiles a graph on its first call. `own`: operands of the cache (cached tensors).

    The compiler may assume for good that two operands which are one tensor now stay so. Dynamo
    guards this for a call's inputs, so only cached tensors are replaced by stand-ins.
    """

    def __init__(self, compile_graph: Compile, part: Part, own: Mapping[str, TensorSpec]) -> None:
        self._compile = compile_graph
        self._part = part
        self._own = own
        self._compiled: Callable[..., Sequence[torch.Tensor]] | None = None
        self._compiling = threading.Lock()

    def __call__(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        compiled = self._compiled or self._made(operands)
        with without_autocast():
            return compiled(*operands)

    def _made(self, operands: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
        with self._compiling, without_autocast():
            if self._compiled is None:
                given = zip(self._part.names, operands, strict=True)
                examples = [self._own[n].zeros() if n in self._own else t for n, t in given]
                self._compiled = self._compile(self._part.gm, examples)
            return self._compiled


def compiled_part(
    part: Part,
    compile_graph: Compile,
    cached: Mapping[str, TensorSpec],
    dynamos: fx.GraphModule,
    inputs: Mapping[str, fx.Node],
) -> CompiledPart:
    """Return `part` with its blocks inlined. `inputs`: name -> input of Dynamo's graph."""
    inlined = Part(like_dynamos(flat(part.gm), dynamos, inputs), part.names)
    compiled = _AtFirstCall(compile_graph, inlined, cached)
    return CompiledPart(inlined.gm, inlined.names, compiled)


def flat(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the same graph without calls of other graphs.

    Before:

        %blocks_0 = call_module[model.blocks.0](%x)         # gives {0: relu(%x)}
        %h = getitem(%blocks_0, 0)

    After:

        %h = relu(%x)
    """
    graph, owner = fx.Graph(), nn.Module()
    places = gm.graph.find_nodes(op="placeholder")
    given: dict[fx.Node, Any] = {n: add_input(graph, n, str(n.target)) for n in places}
    graph.output(_inlined(gm, given, graph, owner))
    return fx.GraphModule(owner, graph, type(gm).__name__)


def _inlined(gm: fx.GraphModule, new: dict[fx.Node, Any], graph: fx.Graph, owner: nn.Module) -> Any:
    """Add a graph's nodes to `graph`; return its output in terms of the new nodes."""

    def instead(node: fx.Node) -> Any:
        source: Any = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and isinstance(new[source], dict):
            return new[source][node.args[1]]
        if node.op == "get_attr":
            return graph.get_attr(_kept(owner, _value(gm, str(node.target))))
        if node.op == "call_module":
            with _entered(graph, meta_of(node).within or Within()):
                return _called(gm, node, new, graph, owner)
        return None

    copy_nodes(graph, body(gm.graph), new, instead)
    return fx.map_arg(gm.graph.output_node().args[0], new.__getitem__)


@contextmanager
def _entered(graph: fx.Graph, within: Within) -> Iterator[None]:
    """Run the nodes that are added inside in these contexts.

    After:

        %entered = _enter_autocast(cpu, torch.bfloat16, True, True)
        %h = relu(%x)
        _exit_autocast(%entered)
    """
    entered = [emit_autocast(graph, *kind, within.cache) for kind in within.autocast]
    if within.attention is not None:
        graph.call_function(use_attention_backends, (within.attention.inside,))
    yield
    if within.attention is not None:
        graph.call_function(use_attention_backends, (within.attention.outside,))
    for node in reversed(entered):
        emit_end_of_autocast(graph, node)


def _called(
    gm: fx.GraphModule, node: fx.Node, new: dict[fx.Node, Any], graph: fx.Graph, owner: nn.Module
) -> Any:
    module = gm.get_submodule(str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
    if not isinstance(module, fx.GraphModule) or kwargs:
        return graph.call_module(_kept(owner, module), args, kwargs)
    places = module.graph.find_nodes(op="placeholder")
    return _inlined(module, dict(zip(places, args, strict=True)), graph, owner)


def _value(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _kept(owner: nn.Module, value: Any) -> str:
    """Return the name of a value in `owner`; add the value if it is missing."""
    names = [*owner._parameters, *owner._buffers, *owner._modules, *vars(owner)]
    known = next((n for n in names if n.startswith("_kept_") and getattr(owner, n) is value), None)
    name = known or f"_kept_{len(names)}"
    if known is None and isinstance(value, torch.Tensor):
        owner.register_buffer(name, value, persistent=False)
    elif known is None:
        setattr(owner, name, value)
    return name
