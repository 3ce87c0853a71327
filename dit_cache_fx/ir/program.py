"""The normal form that every pass reads and writes.

A program is an ATen-level graph over the user's own, live modules: every block is one
`call_module` (`model.transformer_blocks.7`), so is every layer around the blocks, and the timestep
is one placeholder. There is no in-place operation in it.

The timestep has four forms: `timestep_argument` is the name of forward's argument, `timestep_input`
the placeholder of the graph, `timestep_position` its index among the call's tensors, and
`timestep_value` the number that a call gives.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.contexts import generate_contexts
from dit_cache_fx.ir.copying import body, copy_nodes
from dit_cache_fx.ir.node_meta import BlockId, is_block, meta_of
from dit_cache_fx.values.pytree import Skeleton
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Region:
    """A run of cached blocks, from the pass that made it on.

    `blocks`: its members in call order. `values`: names of the nodes that leave it, each one
    tensor to hold. `inputs`: for each value the node that the strategy may set it against (the
    same stream before the run), or None.
    """

    index: int
    blocks: tuple[BlockId, ...]
    values: tuple[str, ...] = ()
    inputs: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        values = [
            value if start is None else f"{value} (from {start})"
            for value, start in zip(self.values, self.inputs, strict=True)
        ]
        blocks = " ".join(map(str, self.blocks))
        return f"run {self.index}: {blocks} -> {', '.join(values) or '?'}"


@dataclass
class Program:
    """A captured call of a model, on its way through the passes."""

    gm: fx.GraphModule
    inputs: tuple[str, ...]  # placeholders of the call's tensors, in order
    arguments: tuple[str, ...]  # for each input, the forward argument that it came in
    timestep_argument: str | None  # the forward argument that tells the step
    timestep_input: str | None  # the input that it came in as
    sample: str | None  # the forward argument that carries the noisy sample
    output: Skeleton
    block_lists: dict[str, int] = field(default_factory=dict)  # list name -> blocks in it
    regions: tuple[Region, ...] = ()
    owned: frozenset[str] = frozenset()  # inputs that are the model's own parameters and buffers
    beside: frozenset[str] = frozenset()  # the arguments of samples beside it (sound, of a video)
    alone: Alone | None = None  # where each of its rows is at a step of its own

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def timestep_position(self) -> int | None:
        """Which of the inputs tells the step."""
        name = self.timestep_input
        return None if name is None else self.inputs.index(name)

    @property
    def model(self) -> nn.Module:
        return self.gm.get_submodule("model")

    def copied(self) -> Program:
        """A program with a graph of its own over the same live model."""
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        copy_nodes(graph, self.graph.nodes, new)
        attributes = attributes_of(self.gm, self.graph)
        gm = graph_module(self.model, attributes, graph, type(self.gm).__name__)
        return replace(self, gm=gm, block_lists=dict(self.block_lists))

    def node(self, name: str) -> fx.Node:
        """The node called `name`."""
        found: fx.Node | None = next((n for n in self.graph.nodes if n.name == name), None)
        if found is None:
            raise VerifyError(f"the program has no node {name!r}")
        return found

    def values(self) -> dict[tuple[int, int], TensorSpec]:
        """What leaves its runs, by run and place."""
        return {
            (region.index, place): tensor_spec(self.node(name))
            for region in self.regions
            for place, name in enumerate(region.values)
        }

    @property
    def signal(self) -> fx.Node | None:
        """The value that the strategy's own rule looks at."""
        return next((n for n in self.graph.nodes if meta_of(n).signal), None)

    def needs(self) -> dict[fx.Node, frozenset[str]]:
        """For each node the forward arguments that it depends on; the model's own are none."""
        arguments = dict(zip(self.inputs, self.arguments, strict=True))
        needs: dict[fx.Node, frozenset[str]] = {}
        for node in self.graph.nodes:
            given = node.op == "placeholder" and node.name not in self.owned
            own = {arguments[node.name]} if given else set()
            needs[node] = frozenset(own).union(*(needs[n] for n in node.all_input_nodes))
        return needs

    def block_calls(self) -> list[fx.Node]:
        """The calls of trunk blocks, in order."""
        return [node for node in self.graph.find_nodes(op="call_module") if is_block(node)]

    def outputs_of_blocks(self) -> list[fx.Node]:
        """The model's own results that its blocks take part in, each once."""
        behind = descendants(self.block_calls())
        return [n for n in self.graph.output_node().all_input_nodes if n in behind]


def graph_module(
    model: nn.Module, attributes: Mapping[str, Any], graph: fx.Graph, name: str
) -> fx.GraphModule:
    """A GraphModule over the *live* model: `model.x` in the graph is whatever is there now."""
    root = nn.Module()
    root.model = model
    for key, value in attributes.items():
        if isinstance(value, torch.Tensor):
            root.register_buffer(key, value, persistent=False)
        else:
            setattr(root, key, value)
    generate_contexts(graph)
    gm = fx.GraphModule(root, graph, name)
    gm.__dict__.pop("model", None)
    gm._modules["model"] = model  # GraphModule has copied the attributes that the graph names
    return gm


def attributes_of(gm: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What `graph` reads from `gm` beside the model: constants and subgraphs."""
    reading = [n for op in ("get_attr", "call_module") for n in graph.find_nodes(op=op)]
    targets = sorted({str(n.target) for n in reading})
    return {t: getattr(gm, t) for t in targets if "." not in t and hasattr(gm, t)}


def inline(
    graph: fx.Graph,
    attributes: dict[str, Any],
    gm: fx.GraphModule,
    inputs: Sequence[fx.Node],
) -> list[fx.Node]:
    """Add all of `gm`, called with `inputs`, to `graph`; returns the nodes of its results.

    What it reads from itself (constants) is added to `attributes`, where need be by another name.
    """
    places = gm.graph.find_nodes(op="placeholder")
    new: dict[fx.Node, fx.Node] = dict(zip(places, inputs, strict=True))
    copy_nodes(graph, body(gm.graph), new)
    for node in gm.graph.find_nodes(op="get_attr"):
        if "." not in node.target:
            new[node].target = _added(attributes, node.target, getattr(gm, node.target))
    results: Any = gm.graph.output_node().args[0]
    return [new[n] if isinstance(n, fx.Node) else n for n in results]


def _added(attributes: dict[str, Any], name: str, value: object) -> str:
    while name in attributes and attributes[name] is not value:
        name += "_"
    attributes[name] = value
    return name


def is_kept(node: fx.Node) -> bool:
    """What dead-code elimination must leave: the interface, and what was marked to run.

    A block without readers is one that is never cached, by the user's wish.
    """
    noted = meta_of(node)
    marked = noted.block is not None or noted.signal or noted.part
    return marked or node.op in ("placeholder", "output")


def is_view(node: fx.Node) -> bool:
    """Whether an operator's result is a part of its input's memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def is_spread(node: fx.Node) -> bool:
    """Whether the node's tensor is a distributed one."""
    told = {n for n in node.graph.nodes if n.op != "call_function" or meta_of(n).spread}
    return any(meta_of(n).spread for n in ancestors([node], stop=told))


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """`nodes` and all that they need; what is in `stop` is included but not looked behind."""
    return _closure(nodes, set(stop), lambda node: node.all_input_nodes)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and all that needs them."""
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
    """The tensors of a block's result: the call itself, or the items taken from it."""
    if meta_of(call).output is not None:
        return [call]
    return [value for item in items_of(call) for value in block_values(item)]


def items_of(node: fx.Node) -> list[fx.Node]:
    """What is taken from a node that gives a container."""
    return [user for user in node.users if user.target in (operator.getitem, getattr)]


#: where a tensor is among a block's arguments: its place or keyword, then keys of containers
Slot = tuple[Any, ...]


def argument_leaves(call: fx.Node) -> list[tuple[Slot, fx.Node]]:
    """The tensors among a block call's arguments, in order, as often as they appear."""
    arguments = [*enumerate(call.args), *call.kwargs.items()]
    return [leaf for key, value in arguments for leaf in _leaves((key,), value)]


def own_leaves(call: fx.Node) -> list[tuple[Slot, fx.Node]]:
    """The same, with what hooks leave of the arguments: what the block itself gets."""
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
    """The block call that a value (or a slice of one) comes from."""
    while not is_block(value):
        value = value.all_input_nodes[0]
    return value


def operations(graph: fx.Graph) -> int:
    """How many nodes of the graph compute something."""
    return sum(n.op in ("call_function", "call_method", "call_module") for n in graph.nodes)


def spec_of(node: fx.Node) -> torch.Tensor | None:
    """A tensor without data of the node's shape and dtype, where the capture knew them."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def tensor_spec(node: fx.Node) -> TensorSpec:
    """Shape, dtype and device of the node's tensor at capture."""
    spec = spec_of(node)
    if spec is None:
        raise VerifyError(f"the shape of {node.name} is not known")
    return TensorSpec(spec.shape, spec.dtype, device_of(node))


def device_of(node: fx.Node) -> torch.device:
    """The device of the node's tensor at capture."""
    device: torch.device = meta_of(node).device or node.meta["val"].device
    return device
