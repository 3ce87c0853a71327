"""Notes of this package on the nodes of a graph, beside torch's own `val`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.within import Within

#: the one key of ours in a node's `meta`
_KEY = "dit_cache_fx"


@dataclass(frozen=True, order=True)
class BlockId:
    """A call of a block: the attribute path of its list, its place in it, which call of it."""

    list_name: str
    index: int
    call: int = 0

    def __str__(self) -> str:
        again = f" (call {self.call})" if self.call else ""
        return f"{self.list_name}.{self.index}{again}"


@dataclass(frozen=True)
class NodeMeta:
    """All that is noted on one node.

    Copies of a node share it, since it never changes: `mark` puts another one in its place.
    `verify` looks after what must hold of it.

    `block`: on the call of a trunk block, and on no other node. `output`, `path`: both or none; on
    a tensor of a module's result, its index among the result's tensors and the keys that lead to
    it there. `keys`: on a container that is made as a module's argument, one for each part.
    `within`: on the call of a module, the contexts that it runs in. `origin`: on a node that was
    moved into a run, the name of that node. `signal`: on the one value that the strategy's own rule
    looks at. `device`: where `val` is on the meta device, the real one. `spread`: each process has
    a part of the tensor. `parts`: on the call of a block, the names of the nodes that hooks leave
    of its arguments. `part`: on such a node, as long as a run may start from it.
    """

    block: BlockId | None = None
    output: int | None = None
    path: tuple[Any, ...] | None = None
    keys: tuple[Any, ...] | None = None
    within: Within | None = None
    origin: str | None = None
    signal: bool = False
    device: torch.device | None = None
    spread: bool = False
    parts: tuple[str, ...] | None = None
    part: bool = False

    def __post_init__(self) -> None:
        if (self.output is None) != (self.path is None):
            raise VerifyError("a tensor of a module's result has both an index and a path")


_NOTHING = NodeMeta()


def meta_of(node: fx.Node) -> NodeMeta:
    """What is noted on a node."""
    noted: NodeMeta = node.meta.get(_KEY, _NOTHING)
    return noted


def mark(node: fx.Node, **changes: Any) -> None:
    """Note something on a node; what else is noted there stays."""
    node.meta[_KEY] = replace(meta_of(node), **changes)


def mark_tensor(node: fx.Node, like: torch.Tensor | None, device: torch.device) -> None:
    """Note which tensor a node gives: one of the shape and dtype of `like`, on this device."""
    node.meta["val"] = like
    mark(node, device=device)


def is_block(node: fx.Node) -> bool:
    """Whether it is the call of a trunk block."""
    return meta_of(node).block is not None


def block_of(call: fx.Node) -> BlockId:
    """Which block a call is of."""
    block = meta_of(call).block
    if block is None:
        raise VerifyError(f"{call.name} is no call of a block")
    return block
