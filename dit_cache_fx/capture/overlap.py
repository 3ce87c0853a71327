"""Whether tensors of a trace share memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.nodes import is_view, spec_of


def readers(node: fx.Node, after: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes among `after` that read an element of the node's tensor."""
    computing = [n for n in after if not _is_view(n)]
    return [n for n in computing if any(_share(node, read) for read in n.all_input_nodes)]


def _share(one: fx.Node, other: fx.Node) -> bool:
    """Return whether the tensors have an element in common."""
    (base, views), (others_base, others) = _views(one), _views(other)
    if base is not others_base:
        return False
    spec = spec_of(base)
    if spec is None or not views or not others:
        return True
    touched = torch.zeros_like(spec, dtype=torch.bool, device="cpu")
    try:
        _viewed(touched, views).fill_(True)
        return bool(_viewed(touched, others).any())
    except (RuntimeError, TypeError):  # a view as another dtype, an expanded tensor
        return True


def _views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the tensor whose memory the node's tensor has, and the views from there to it."""
    views: list[fx.Node] = []
    while _is_view(node):
        views.append(node)
        node = node.all_input_nodes[0]
    return node, views[::-1]


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # one of several views
        return is_view(node.all_input_nodes[0])
    return is_view(node)


def _viewed(value: Any, views: Sequence[fx.Node]) -> Any:
    for view in views:
        target: Any = view.target
        value = target(value, *view.args[1:], **view.kwargs)
    return value
