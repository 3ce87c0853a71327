"""`Program`: a captured model as an ATen graph that calls the model's own blocks.

A program is an ATen-level graph over the user's own, live modules: every block is one `call_module`
(`model.transformer_blocks.7`), so is every layer around the blocks, and the timestep is one
placeholder. It contains no in-place operation.

The timestep has four forms: `timestep_argument` is the name of forward's argument, `timestep_input`
the placeholder of the graph, `timestep_position` its index among the call's tensors, and
`timestep_value` the number in a call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx, nn

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.copying import copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.node_meta import BlockId, is_block, meta_of
from dit_cache_fx.ir.nodes import descendants, tensor_spec
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
