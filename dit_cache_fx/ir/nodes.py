"""Questions about nodes: what they depend on, the tensors of a block call, specs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.node_meta import is_block, meta_of
from dit_cache_fx.values.tensor_spec import TensorSpec


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


def is_exposed(node: fx.Node) -> bool:
    """Return whether code outside the graph gets the tensor, or a view of it."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            return True
        if is_view(user) and is_exposed(user):
            return True
    return False


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


def module_reads(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call a module or read an attribute."""
    return [n for op in ("get_attr", "call_module") for n in graph.find_nodes(op=op)]


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
