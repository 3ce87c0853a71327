"""Pass 0: a part taken out of a joined sequence is the part that went in."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from dit_cache_fx.program import Program, attributes_of, graph_module, is_kept, spec_of
from dit_cache_fx.strategies import Strategy

_SLICE = torch.ops.aten.slice.Tensor
_DEFAULTS: tuple[Any, ...] = (None, 0, 0, sys.maxsize, 1)
_CAT = torch.ops.aten.cat.default


def forward_slices(program: Program, strategy: Strategy) -> None:
    """Read the first part of a concatenation directly.

    Before:

        %x = aten.cat([%img, %txt], 1)
        %y = aten.slice(%x, 1, 0, 16)          # img has 16 rows
        %out = call_module[model.final_layer](%y)

    After:

        %out = call_module[model.final_layer](%img)

    So the text, which only went in to be cut off again, is not held. Only the first part is taken:
    the place of a later one could depend on the data (on a mask's length).
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        part = _first_part(node)
        if part is not None:
            node.replace_all_uses_with(part)
    attributes = attributes_of(program.gm, graph)
    program.gm = graph_module(program.model, attributes, graph, "Captured")
    program.gm.graph.eliminate_dead_code(is_kept)
    program.gm.recompile()


def _first_part(node: fx.Node) -> fx.Node | None:
    if node.target is not _SLICE:
        return None
    arguments: tuple[Any, ...] = node.args
    source, dim, start, end, step = arguments + _DEFAULTS[len(arguments) :]
    if not isinstance(source, fx.Node) or source.target is not _CAT or (start, step) != (0, 1):
        return None
    joined: tuple[Any, ...] = source.args
    along = joined[1] if len(joined) > 1 else 0
    first: Any = joined[0][0]
    spec = spec_of(first)
    if spec is None or (along - dim) % spec.ndim or spec.shape[dim] != end:
        return None
    result: fx.Node = first
    return result
