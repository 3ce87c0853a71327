"""Phase two of a capture: trace the model's own code, with leaf modules as single nodes.

No leaf module runs here: each returns its recorded result. A value that the code reads from a
tensor becomes a guard (`data_guards`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from dit_cache_fx._torch import Emitter, opaque, trace_functional
from dit_cache_fx.capture.autograd_functions import forward_only
from dit_cache_fx.capture.data_guards import DataReads, PythonReads, read_count, read_shape
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.overlap import readers
from dit_cache_fx.capture.recording import RecordedCall, Recording
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.node_meta import mark, mark_tensor
from dit_cache_fx.values.containers import (
    Maker,
    accessor,
    build,
    is_constructible,
    make_container,
)
from dit_cache_fx.values.pytree import Skeleton, flatten, key_paths, unflatten
from dit_cache_fx.values.wrapped import is_distributed


def call_leaf(index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Mark the call of a leaf module (the recording's call `index`) while tracing."""
    raise AssertionError("placeholder of the capture")


@dataclass
class Trace:
    """A traced call, before it is in normal form."""

    gm: fx.GraphModule
    output: Skeleton
    read: list[Any]  # the value of each guard, in node order


def trace(
    run: Callable[[Sequence[torch.Tensor]], Any],
    tensors: Sequence[torch.Tensor],
    leaves: Mapping[nn.Module, str],
    recording: Recording,
) -> Trace:
    """Trace `run(tensors)`; its leaf modules return their results from `recording`.

    Composite operators (`pad_sequence`) are decomposed, with in-place operations inside: then the
    graph is traced a second time, operator by operator.
    """
    traced = _trace(run, tensors, leaves, _Player(recording))
    if _mutations(traced.gm):
        player = _Player(recording)
        again = _trace(_Retrace(traced, player).run_all, tensors, leaves, player)
        traced = replace(again, output=traced.output)
    _refuse_read_after_change(traced.gm.graph, recording)
    left = _mutations(traced.gm)
    if left:
        raise CaptureError(
            f"the graph still contains operators that change a tensor in place: {left}"
        )
    return traced


def _trace(
    run: Callable[[Sequence[torch.Tensor]], Any],
    tensors: Sequence[torch.Tensor],
    leaves: Mapping[nn.Module, str],
    player: _Player,
) -> Trace:
    read: list[Any] = []
    output: list[Skeleton] = []

    def body(*inputs: torch.Tensor) -> list[torch.Tensor]:
        with (
            intercepted(leaves, player.handle),
            forward_only(),
            PythonReads(read),
            NumberFactories(),
            DataReads(read),
        ):
            results, skeleton = flatten(run(inputs))
        output.append(skeleton)
        return results

    # an object passed as two arguments must become two inputs of the graph
    gm = trace_functional(body, [t.detach() for t in tensors])
    for name, value in player.objects.items():
        setattr(gm, name, value)
    for node, tensor in zip(gm.graph.nodes, tensors, strict=False):  # inputs come first
        mark(node, spread=is_distributed(tensor))
    return Trace(gm, output[0], read)


def _refuse_read_after_change(graph: fx.Graph, recording: Recording) -> None:
    """Refuse a model that reads a tensor after one of its modules changed it in place."""
    nodes = [*graph.nodes]
    for node in graph.find_nodes(op="call_function", target=call_leaf):
        if not recording.calls[node.args[0]].mutated:
            continue
        copies = [n for n in node.all_input_nodes if n.target is torch.ops.aten.clone.default]
        for source in (s for copy in copies for s in copy.all_input_nodes):
            if readers(source, nodes[nodes.index(node) + 1 :]):
                raise CaptureError(
                    f"module {node.args[1]!r} changes one of its inputs in place and the model "
                    "reads that input afterwards: a cached step could not do the same. Let the "
                    "module return the changed tensor instead"
                )


def _mutations(gm: fx.GraphModule) -> list[str]:
    functions = [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return sorted({str(f) for f in functions if f._schema.is_mutable})


class _Retrace(fx.Interpreter):
    """Runs a trace again, inside another trace."""

    def __init__(self, traced: Trace, player: _Player) -> None:
        super().__init__(traced.gm)
        self._player = player

    def run_all(self, inputs: Sequence[torch.Tensor]) -> Any:
        return self.run(*inputs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is call_leaf:
            index, _, *arguments = args
            return self._player.answer(index, *map(_mutable, arguments))
        return (
            None
            if target in (read_count, read_shape)
            else super().call_function(target, args, kwargs)
        )


def _mutable(value: Any) -> Any:
    """Return a graph's immutable arguments with mutable containers, as in a call."""
    if isinstance(value, immutable_dict):
        return {key: _mutable(child) for key, child in value.items()}
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    return list(map(_mutable, value)) if isinstance(value, immutable_list) else value


class _Player:
    """Answers the calls of leaf modules from a recording, in order."""

    def __init__(self, recording: Recording) -> None:
        self._calls = recording.calls
        self._next = 0
        self.objects: dict[str, Any] = {}

    def handle(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        index, self._next = self._next, self._next + 1
        was = self._calls[index].name if index < len(self._calls) else None
        if was != name:
            raise CaptureError(
                f"the model called {name!r} where its previous run called {was!r}: its control "
                "flow depends on something that changes between calls"
            )
        return self.answer(index, args, kwargs)

    def answer(self, index: int, args: Any, kwargs: Any) -> Any:
        """Add the recorded call `index` to the graph; return its recorded result."""
        made = self._calls[index]
        inputs, skeleton = flatten((args, kwargs))
        for place in made.mutated:  # the module changes a copy
            inputs[place] = inputs[place].clone()
        parts = [] if made.split is None else made.split(inputs, skeleton)
        if len(parts) != len(inputs):
            parts = []
        call = _Replay(index, made, skeleton, self.objects, len(inputs))
        outputs = opaque(call, [*inputs, *parts])
        return unflatten(made.skeleton, outputs)


@dataclass
class _Replay:
    """A recorded call as an operator that is opaque to the tracer."""

    index: int
    made: RecordedCall
    inputs: Skeleton
    objects: dict[str, Any]
    given: int  # tensors of the call; the split ones follow

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.made.outputs()

    def emit(
        self, graph: Emitter, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]
    ) -> Sequence[Any]:
        args, kwargs = unflatten(
            self.inputs,
            inputs[: self.given],
            lambda value: self._attribute(graph, value),
            lambda *container: self._container(graph, *container),
        )
        name = self.made.name
        node = graph.call(call_leaf, (self.index, name, args, kwargs), {}, _node_name(name))
        parts = tuple(proxy.node.name for proxy in inputs[self.given :])
        mark(node.node, within=self.made.within or None, parts=parts or None)
        proxies = []
        for index, path in enumerate(key_paths(self.made.skeleton)):
            proxy, tensor = _follow(node, path), outputs[index]
            mark_tensor(proxy.node, _without_data(tensor), tensor.device)
            mark(proxy.node, output=index, path=tuple(key for _, key in path))
            mark(proxy.node, spread=is_distributed(tensor))
            proxies.append(proxy)
        return proxies

    def _container(self, graph: Emitter, kind: Any, keys: Any, children: list[Any]) -> Any:
        """Return a container as an argument: a node builds what a graph has no literal for."""
        if kind in (dict, list, tuple):
            return build(kind, keys, children)
        if is_constructible(kind):
            made = graph.call(kind, (), dict(zip(keys, children, strict=True)), kind.__name__)
        else:
            maker = self._attribute(graph, self._maker(kind, keys))
            made = graph.call(make_container, (maker, *children), {}, kind.__name__)
        mark(made.node, keys=keys)
        return made

    def _maker(self, kind: Any, keys: Any) -> Maker:
        wanted = Maker(kind, keys)
        known = [m for m in self.objects.values() if isinstance(m, Maker)]
        return next((m for m in known if m == wanted), wanted)

    def _attribute(self, graph: Emitter, value: object) -> fx.Proxy:
        name = next((n for n, v in self.objects.items() if v is value), None)
        if name is None:
            name = f"_object_{len(self.objects)}"
            self.objects[name] = value
        return graph.attribute(name, value)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    if not is_distributed(tensor):
        return tensor.to("meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _node_name(module_name: str) -> str:
    return module_name.replace(".", "_")


def _follow(node: Any, path: Sequence[tuple[type, Any]]) -> Any:
    for kind, key in path:
        node = accessor(kind, key)(node)
    return node
