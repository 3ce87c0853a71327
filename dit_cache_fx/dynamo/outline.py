"""Turn the modules that Dynamo inlined into submodules of its graph again."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import fx, nn

from dit_cache_fx.capture import BlockList
from dit_cache_fx.dynamo.sources import ModuleCall, Path, module_calls
from dit_cache_fx.ir.copying import copy_nodes

#: selects the module call of a node's group
Chooser = Callable[[Sequence[ModuleCall]], ModuleCall | None]
#: the path of single operations that become calls
LEAVES = "leaves"
_OPERATIONS = ("call_function", "call_method", "call_module")


@dataclass
class Group:
    """The nodes of one module call, in order."""

    call: ModuleCall
    nodes: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> list[fx.Node]:
        """Return the outside nodes that it reads, in order of reading."""
        inside = set(self.nodes)
        read = (n for node in self.nodes for n in node.all_input_nodes)
        return [n for n in dict.fromkeys(read) if n not in inside and n.op != "get_attr"]

    def outputs(self) -> list[fx.Node]:
        """Return its nodes that other nodes read."""
        inside = set(self.nodes)
        return [node for node in self.nodes if not inside.issuperset(node.users)]


def outline(
    gm: fx.GraphModule, opaque: Collection[fx.Node] = ()
) -> tuple[fx.GraphModule, list[BlockList]]:
    """Return Dynamo's graph with each member of a module list as one call, and those lists.

    Before (nodes of `blocks[0]`, of `blocks[1]`):

        %linear = linear(%x, %l_self_blocks_0_weight)
        %relu = relu(%linear)
        %linear_1 = linear(%relu, %l_self_blocks_1_weight)

    After:

        %blocks_0 = call_module[blocks.0](%x, %l_self_blocks_0_weight)
        %relu = getitem(%blocks_0, 0)
        %blocks_1 = call_module[blocks.1](%relu, %l_self_blocks_1_weight)

    A block returns a dict of tensors. A key stands for a place in the source, the same for every
    block of a list. The parts of a block are submodules of it in the same way.

    A node that reads `opaque` inputs (quantised weights) is a call too, of `leaves.(its name)`.
    """
    outliner = _Outliner(gm, opaque)
    graph = outliner.rewritten(gm.graph.nodes, outer_member, ())
    outlined = fx.GraphModule(outliner.owner, graph, "Outlined")
    return outlined, _lists(outliner.members)


def outer_member(calls: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the outermost call of a list member: of `blocks.0` if `blocks` is not called.

    A module that calls its members itself (`nn.Sequential`) does not count.
    """
    called = {call.path for call in calls}
    for call in calls:
        if call.path[-1].isdigit() and call.path[:-1] not in called:
            return call
    return None


def _part_of(block: ModuleCall) -> Chooser:
    """Return a chooser for the calls directly inside of a block."""

    def choose(calls: Sequence[ModuleCall]) -> ModuleCall | None:
        keys = [call.key for call in calls]
        place = keys.index(block.key) + 1 if block.key in keys else len(calls)
        return calls[place] if place < len(calls) else None

    return choose


def _no_call(_: Sequence[ModuleCall]) -> ModuleCall | None:
    """Choose no call."""
    return None


def is_number(node: fx.Node) -> bool:
    """Return whether the node reads a number that Dynamo passes as a tensor (a varying float)."""
    reads = node.op == "call_method" and node.target == "item"
    return reads and node.all_input_nodes[0].op == "placeholder"


class _Outliner:
    def __init__(self, gm: fx.GraphModule, opaque: Collection[fx.Node]) -> None:
        self.gm = gm
        self.opaque = opaque
        #: the owner of all outlined modules, and of everything that the graphs read
        self.owner = fx.GraphModule(nn.Module(), fx.Graph())
        self.members: dict[Path, dict[int, nn.Module]] = {}
        self._labels: dict[Path, dict[object, int]] = {}
        starts = {c.path[0] for node in gm.graph.nodes for c in module_calls(node)}
        self._start = 1 if len(starts) == 1 else 0  # of paths: skips the local variable

    def rewritten(
        self,
        nodes: Iterable[fx.Node],
        choose: Chooser,
        inputs: Sequence[fx.Node],
        group: Group | None = None,
    ) -> fx.Graph:
        """Return a graph of `nodes` with each group as one call; with `group`, of its inside."""
        graph = fx.Graph()
        new = {node: graph.placeholder(node.name) for node in inputs}
        for item in _segments(list(nodes), choose):
            if isinstance(item, Group):
                self._call(graph, item, new, nested=group is not None)
            elif group is None and any(n in self.opaque for n in item.all_input_nodes):
                self._alone(graph, item, new)
            else:
                self._copy(graph, item, new)
        if group is not None:
            results: Any = {label: new[n] for label, n in self._labelled(group)}
            graph.output(results)
        return graph

    def _copy(self, graph: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node]) -> None:
        if is_number(node):
            new[node] = new[node.all_input_nodes[0]]
            return
        attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
        copy_nodes(graph, [*attributes, node], new)
        for name in (str(n.target) for n in (node, *node.all_input_nodes) if n.op == "get_attr"):
            setattr(self.owner, name, getattr(self.gm, name))
        if node.op == "call_module":
            self.owner.add_submodule(str(node.target), self.gm.get_submodule(str(node.target)))

    def _call(
        self, graph: fx.Graph, group: Group, new: dict[fx.Node, fx.Node], nested: bool
    ) -> None:
        inputs = group.inputs()
        chooser = _no_call if nested else _part_of(group.call)
        inside = self.rewritten(group.nodes, chooser, inputs, group)
        module = fx.GraphModule(self.owner, inside, "Part" if nested else "Block")
        name = self._placed(group, module, nested)
        call = graph.call_module(name, tuple(new[n] for n in inputs))
        for label, node in self._labelled(group):
            new[node] = graph.call_function(operator.getitem, (call, label))
            new[node].meta.update(node.meta)

    def _alone(self, graph: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node]) -> None:
        """Turn one operation into a call."""
        group = Group(ModuleCall(node.name, ()), [node])
        inputs = group.inputs()
        name = f"{LEAVES}.{node.name}"
        inside = self.rewritten(group.nodes, _no_call, inputs, group)
        self.owner.add_submodule(name, fx.GraphModule(self.owner, inside, "Leaf"))
        call = graph.call_module(name, tuple(new[n] for n in inputs))
        for label, made in self._labelled(group):
            new[made] = graph.call_function(operator.getitem, (call, label))
            new[made].meta.update(made.meta)

    def _placed(self, group: Group, module: nn.Module, nested: bool) -> str:
        """Add an outlined module at its path; return its name there."""
        path = group.call.path[self._start :]
        again = group.call.key.partition("@")[2]  # the second call of a module, and so on
        *within, last = [f"{path[0]}_{again}" if again else path[0], *path[1:]]
        if nested:
            within, last = ["parts"], "_".join([*within, last])
        else:
            self.members.setdefault(tuple(within), {})[int(last)] = module
        name = ".".join([*within, last])
        self.owner.add_submodule(name, module)
        return name

    def _labelled(self, group: Group) -> list[tuple[int, fx.Node]]:
        """Return the outputs of a group, with labels that all members of its list share."""
        labels = self._labels.setdefault(group.call.path[:-1], {})
        seen: Counter[object] = Counter()
        found: dict[fx.Node, int] = {}
        outputs = set(group.outputs())
        for node, place in reversed([*zip(group.nodes, _places(group.nodes), strict=True)]):
            if node in outputs:
                found[node] = labels.setdefault((place, seen[place]), len(labels))
            seen[place] += 1
        return sorted((label, node) for node, label in found.items())


def _places(nodes: Sequence[fx.Node]) -> list[tuple[str, ...]]:
    """Return the source location of each node, relative to their common part."""
    frames = [tuple((n.meta.get("stack_trace") or "").split("  File ")) for n in nodes]
    shared = takewhile(lambda same: len(set(same)) == 1, zip(*frames, strict=False))
    start = len(list(shared))
    return [frame[start:] for frame in frames]


def _lists(members: Mapping[Path, Mapping[int, nn.Module]]) -> list[BlockList]:
    """Return the lists; a member that Dynamo's graph does not call is an empty module."""
    return [
        BlockList(".".join(path), tuple(found.get(i, nn.Module()) for i in range(max(found) + 1)))
        for path, found in members.items()
    ]


def _segments(nodes: Sequence[fx.Node], choose: Chooser) -> list[fx.Node | Group]:
    """Return the nodes in order; those of one module call, and nodes between them, as a group."""
    found: dict[str, Group] = {}
    spans: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        call = choose(module_calls(node)) if node.op in _OPERATIONS else None
        if call is not None:
            found.setdefault(call.key, Group(call))
            spans.setdefault(call.key, []).append(place)
    ends = {places[0]: (key, places[-1]) for key, places in spans.items()}
    segments: list[fx.Node | Group] = []
    place = 0
    while place < len(nodes):
        key, end = ends.get(place, ("", place))
        inside = [n for n in nodes[place : end + 1] if n.op != "get_attr"]
        if key:
            found[key].nodes = inside  # with the nodes between them
        segments += [found[key]] if key else inside
        place = end + 1
    return segments
