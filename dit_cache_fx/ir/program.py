"""`Program`: a captured model as an ATen graph that calls the model's own blocks.

A program is an ATen-level graph over the user's own, live modules: every block is one `call_module`
(`model.transformer_blocks.7`), so is every layer around the blocks, and the timestep is one
placeholder. It contains no in-place operation.

The timestep has four forms: `timestep_argument` is the name of forward's argument, `timestep_input`
the placeholder of the graph, `timestep_position` its index among the call's tensors, and
`timestep_value` the number in a call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import LazyGraphModule
from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.codegen import customize_code
from dit_cache_fx.ir.copying import body, copy_nodes, results_of
from dit_cache_fx.ir.node_meta import BlockId, is_block, meta_of
from dit_cache_fx.values.pytree import Skeleton
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Region:
    """A run of cached blocks; `select_runs` creates it.

    `blocks`: its members in call order. `values`: the names of the nodes that leave it, each one a
    tensor to cache. `run_inputs`: for each value, the node to compare it with (the same stream
    before the run), or None.
    """

    index: int
    blocks: tuple[BlockId, ...]
    values: tuple[str, ...] = ()
    run_inputs: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        values = [
            value if run_input is None else f"{value} (from {run_input})"
            for value, run_input in zip(self.values, self.run_inputs, strict=True)
        ]
        blocks = " ".join(map(str, self.blocks))
        return f"run {self.index}: {blocks} -> {', '.join(values) or '?'}"


@dataclass
class Program:
    """A captured call of a model, on its way through the passes."""

    gm: fx.GraphModule
    inputs: tuple[str, ...]  # placeholders of the call's tensors, in order
    arguments: tuple[str, ...]  # for each input, the forward argument that it came in
    timestep_argument: str | None  # the forward argument that gives the step
    timestep_input: str | None  # its placeholder
    sample: str | None  # the forward argument that carries the noisy sample
    output: Skeleton
    block_lists: dict[str, int] = field(default_factory=dict)  # list name -> blocks in it
    regions: tuple[Region, ...] = ()
    owned: frozenset[str] = frozenset()  # inputs that are the model's own parameters and buffers
    beside: frozenset[str] = frozenset()  # the arguments of further samples (the sound of a video)
    alone: Alone | None = None  # where each of its rows has its own step

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def timestep_position(self) -> int | None:
        """The index of the timestep among the inputs."""
        name = self.timestep_input
        return None if name is None else self.inputs.index(name)

    @property
    def model(self) -> nn.Module:
        return self.gm.get_submodule("model")

    def copied(self) -> Program:
        """Return a program with a copy of the graph over the same live model."""
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        copy_nodes(graph, self.graph.nodes, new)
        attributes = attributes_of(self.gm, self.graph)
        gm = graph_module(self.model, attributes, graph, type(self.gm).__name__)
        return replace(self, gm=gm, block_lists=dict(self.block_lists))

    def node(self, name: str) -> fx.Node:
        """Return the node called `name`."""
        found: fx.Node | None = next((n for n in self.graph.nodes if n.name == name), None)
        if found is None:
            raise VerifyError(f"the program has no node {name!r}")
        return found

    def values(self) -> dict[tuple[int, int], TensorSpec]:
        """Return the specs of the values that leave its runs, by run and place."""
        return {
            (region.index, place): tensor_spec(self.node(name))
            for region in self.regions
            for place, name in enumerate(region.values)
        }

    @property
    def signal(self) -> fx.Node | None:
        """The value that the strategy's rule reads."""
        return next((n for n in self.graph.nodes if meta_of(n).signal), None)

    def needs(self) -> dict[fx.Node, frozenset[str]]:
        """Return the forward arguments of each node; none for the model's own tensors."""
        arguments = dict(zip(self.inputs, self.arguments, strict=True))
        needs: dict[fx.Node, frozenset[str]] = {}
        for node in self.graph.nodes:
            given = node.op == "placeholder" and node.name not in self.owned
            own = {arguments[node.name]} if given else set()
            needs[node] = frozenset(own).union(*(needs[n] for n in node.all_input_nodes))
        return needs

    def block_calls(self) -> list[fx.Node]:
        """Return the calls of trunk blocks, in order."""
        return [node for node in self.graph.find_nodes(op="call_module") if is_block(node)]

    def outputs_of_blocks(self) -> list[fx.Node]:
        """Return the model's results that depend on its blocks, each once."""
        behind = descendants(self.block_calls())
        return [n for n in self.graph.output_node().all_input_nodes if n in behind]


def graph_module(
    model: nn.Module, attributes: Mapping[str, Any], graph: fx.Graph, name: str
) -> fx.GraphModule:
    """Make a GraphModule over the *live* model: `model.x` in the graph follows the model.

    It has no code until it runs, or `generate_code` is called with it.
    """
    root = nn.Module()
    root.model = model
    for key, value in attributes.items():
        if isinstance(value, torch.Tensor):
            root.register_buffer(key, value, persistent=False)
        else:
            setattr(root, key, value)
    customize_code(graph)
    gm = LazyGraphModule(root, graph, name)
    gm.__dict__.pop("model", None)
    gm._modules["model"] = model  # GraphModule has copied the attributes in the graph
    return gm


def attributes_of(gm: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """Return what `graph` reads from `gm` besides the model: constants and subgraphs."""
    reading = [n for op in ("get_attr", "call_module") for n in graph.find_nodes(op=op)]
    targets = sorted({str(n.target) for n in reading})
    return {t: getattr(gm, t) for t in targets if "." not in t and hasattr(gm, t)}


def inline(
    graph: fx.Graph,
    attributes: dict[str, Any],
    gm: fx.GraphModule,
    inputs: Sequence[fx.Node],
) -> list[fx.Node]:
    """Add all of `gm`, called with `inputs`, to `graph`; return the nodes of its results.

    Its constants are added to `attributes`, renamed if necessary.
    """
    places = gm.graph.find_nodes(op="placeholder")
    new: dict[fx.Node, fx.Node] = dict(zip(places, inputs, strict=True))
    copy_nodes(graph, body(gm.graph), new)
    adopt(attributes, gm, new)
    return [new[n] if isinstance(n, fx.Node) else n for n in results_of(gm.graph)]


def adopt(attributes: dict[str, Any], gm: fx.GraphModule, new: Mapping[fx.Node, fx.Node]) -> None:
    """Add the attributes that `gm` reads from itself to those of another graph.

    `new`: node of `gm` -> its copy there, which reads another name if its own is taken.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        if "." not in node.target:
            new[node].target = _added(attributes, node.target, getattr(gm, node.target))


def _added(attributes: dict[str, Any], name: str, value: object) -> str:
    while name in attributes and attributes[name] is not value:
        name += "_"
    attributes[name] = value
    return name


def is_kept(node: fx.Node) -> bool:
    """Return whether dead-code elimination must keep a node: the interface, and marked nodes.

    A block without readers is one that the user wants to run on every step.
    """
    noted = meta_of(node)
    marked = noted.block is not None or noted.signal or noted.part
    return marked or node.op in ("placeholder", "output")


def is_view(node: fx.Node) -> bool:
    """Return whether an operator's result shares its input's memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def is_spread(node: fx.Node) -> bool:
    """Return whether the node's tensor is a DTensor."""
    told = {n for n in node.graph.nodes if n.op != "call_function" or meta_of(n).spread}
    return any(meta_of(n).spread for n in ancestors([node], stop=told))


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Return `nodes` and all their inputs; the search does not go past `stop`."""
    return _closure(nodes, set(stop), lambda node: node.all_input_nodes)


def inputs_behind(node: fx.Node) -> list[fx.Node]:
    """Return the graph's inputs that a node depends on."""
    return [n for n in ancestors([node]) if n.op == "placeholder"]


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `nodes` and all their readers, transitively."""
    return _closure(nodes, set(), lambda node: list(node.users))


def _closure(nodes: Iterable[fx.Node], stop: set[fx.Node], step: Any) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in stop:
            stack.extend(step(node))
    return seen


def block_values(call: fx.Node) -> list[fx.Node]:
    """Return the tensors of a block's result: the call itself, or the items taken from it."""
    if meta_of(call).output is not None:
        return [call]
    return [value for item in items_of(call) for value in block_values(item)]


def items_of(node: fx.Node) -> list[fx.Node]:
    """Return the items that are taken from a node with a container as its value."""
    return [user for user in node.users if user.target in (operator.getitem, getattr)]


#: the position of a tensor among a block's arguments: index or keyword, then container keys
Slot = tuple[Any, ...]


def argument_leaves(call: fx.Node) -> list[tuple[Slot, fx.Node]]:
    """Return the tensors among a block call's arguments, in order, with repetitions."""
    arguments = [*enumerate(call.args), *call.kwargs.items()]
    return [leaf for key, value in arguments for leaf in _leaves((key,), value)]


def own_leaves(call: fx.Node) -> list[tuple[Slot, fx.Node]]:
    """Like `argument_leaves`, after hooks changed the arguments: the block's real inputs."""
    leaves, parts = argument_leaves(call), meta_of(call).parts or ()
    if len(parts) != len(leaves):
        return leaves
    named = {node.name: node for node in call.graph.nodes}
    return [(slot, named[part]) for (slot, _), part in zip(leaves, parts, strict=True)]


def _leaves(slot: Slot, value: Any) -> Iterator[tuple[Slot, fx.Node]]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, fx.Node) and (keys := meta_of(value).keys) is not None:
        parts = [*value.kwargs.values()] or value.args[1:]
        children = zip(keys, parts, strict=True)
    elif isinstance(value, fx.Node):
        if value.op != "get_attr" or spec_of(value) is not None:
            yield slot, value
    elif isinstance(value, dict):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    for key, child in children:
        yield from _leaves((*slot, key), child)


def block_call_of(value: fx.Node) -> fx.Node:
    """Return the block call that a value (or a slice of one) comes from."""
    while not is_block(value):
        value = value.all_input_nodes[0]
    return value


def module_name(call: fx.Node) -> str:
    """Return the attribute path, in the model, of the module that a node calls."""
    return str(call.target).removeprefix("model.")


def operations(graph: fx.Graph) -> int:
    """Return the number of nodes that compute something."""
    return sum(n.op in ("call_function", "call_method", "call_module") for n in graph.nodes)


def spec_of(node: fx.Node) -> torch.Tensor | None:
    """Return a tensor without data of the node's shape and dtype, if the capture knew them."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def tensor_spec(node: fx.Node) -> TensorSpec:
    """Return the shape, dtype and device of the node's tensor at capture."""
    spec = spec_of(node)
    if spec is None:
        raise VerifyError(f"the shape of {node.name} is unknown")
    return TensorSpec(spec.shape, spec.dtype, device_of(node))


def device_of(node: fx.Node) -> torch.device:
    """Return the device of the node's tensor at capture."""
    device: torch.device = meta_of(node).device or node.meta["val"].device
    return device
