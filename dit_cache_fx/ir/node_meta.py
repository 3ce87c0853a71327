"""This package's metadata on the nodes of a graph, besides torch's own `val`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.within import Within

#: our only key in a node's `meta`
_KEY = "dit_cache_fx"


@dataclass(frozen=True, order=True)
class BlockId:
    """A call of a block: the attribute path of its list, its index, and the number of the call."""

    list_name: str
    index: int
    call: int = 0

    def __str__(self) -> str:
        again = f" (call {self.call})" if self.call else ""
        return f"{self.list_name}.{self.index}{again}"


@dataclass(frozen=True)
class NodeMeta:
    """The metadata of one node.

    It is immutable, so copies of a node share it; `mark` replaces it. `verify` checks its
    invariants.

    `block`: on the call of a trunk block, and on no other node. `output`, `path`: both or none; on
    a tensor of a module's result, its index among the result's tensors, and the keys that lead to
    it. `keys`: on a container that is built for a module's argument, one for each part. `within`:
    on the call of a module, the contexts that it runs in. `origin`: on a node that was moved into a
    run, the name of that node. `signal`: on the only value that the strategy's rule reads.
    `device`: if `val` is on the meta device, the real one. `spread`: each process has a part of the
    tensor. `parts`: on the call of a block, the names of the nodes for its arguments after hooks.
    `part`: on such a node, as long as a run may start from it.
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
            raise VerifyError("a tensor of a module's result needs both an index and a path")


_NOTHING = NodeMeta()


def meta_of(node: fx.Node) -> NodeMeta:
    """Return the metadata of a node."""
    noted: NodeMeta = node.meta.get(_KEY, _NOTHING)
    return noted


def mark(node: fx.Node, **changes: Any) -> None:
    """Change some metadata of a node; keep the rest."""
    node.meta[_KEY] = replace(meta_of(node), **changes)


def mark_tensor(node: fx.Node, like: torch.Tensor | None, device: torch.device) -> None:
    """Note the tensor of a node: the shape and dtype of `like`, on this device."""
    node.meta["val"] = like
    mark(node, device=device)


def is_block(node: fx.Node) -> bool:
    """Return whether the node is the call of a trunk block."""
    return meta_of(node).block is not None


def block_of(call: fx.Node) -> BlockId:
    """Return the block that a node calls."""
    block = meta_of(call).block
    if block is None:
        raise VerifyError(f"{call.name} is no call of a block")
    return block
