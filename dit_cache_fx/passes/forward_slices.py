"""Pass 0: read a slice of a concatenation directly from the tensor that went in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.nodes import ancestors, is_kept, spec_of
from dit_cache_fx.ir.program import Program
from dit_cache_fx.strategies import Strategy

_SLICE = torch.ops.aten.slice.Tensor
_DEFAULTS: tuple[Any, ...] = (None, 0, 0, sys.maxsize, 1)
_CAT = torch.ops.aten.cat.default


def forward_slices(program: Program, strategy: Strategy) -> None:
    """Read a part of a concatenation directly.

    Before:

        %x = aten.cat([%img, %txt], 1)
        %y = aten.slice(%x, 1, 0, 16)          # img has 16 rows
        %out = call_module[model.final_layer](%y)

    After:

        %out = call_module[model.final_layer](%img)

    So the text, which was joined only to be cut off again, is not cached. A part whose position
    depends on data (on a mask's length) is left unchanged.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.find_nodes(op="call_function", target=_SLICE):
        part = _part(node)
        if part is not None:
            node.replace_all_uses_with(part)
    attributes = attributes_of(program.gm, graph)
    program.gm = graph_module(program.model, attributes, graph, "Captured")
    program.gm.graph.eliminate_dead_code(is_kept)
    program.gm.recompile()


def _part(node: fx.Node) -> fx.Node | None:
    """Return the input of a concatenation that a slice takes, if it takes exactly one."""
    arguments: tuple[Any, ...] = node.args
    source, dim, start, end, step = arguments + _DEFAULTS[len(arguments) :]
    if not isinstance(source, fx.Node) or source.target is not _CAT or step != 1:
        return None
    joined: tuple[Any, ...] = source.args
    parts, along = joined[0], joined[1] if len(joined) > 1 else 0
    specs = [spec_of(part) for part in parts]
    if any(spec is None or (along - dim) % spec.ndim for spec in specs):
        return None
    sizes = [spec.shape[dim] for spec in specs if spec is not None]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    for i, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        if begin == start and begin + size == min(end, sum(sizes)) and _fixed(parts[:i]):
            part: fx.Node = parts[i]
            return part
    return None


def _fixed(parts: Sequence[fx.Node]) -> bool:
    """Return whether all sizes in `parts` are independent of data."""
    operators = [n.target for n in ancestors(parts) if isinstance(n.target, torch._ops.OpOverload)]
    return not any(torch.Tag.dynamic_output_shape in operator.tags for operator in operators)
