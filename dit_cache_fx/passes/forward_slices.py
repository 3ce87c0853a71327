"""Pass 0: a part taken out of a joined sequence is the part that went in."""

from __future__ import annotations

import sys

import torch
from torch import fx

from dit_cache_fx.program import Program, attributes_of, graph_module, spec_of
from dit_cache_fx.strategies import Strategy

_SLICE = torch.ops.aten.slice.Tensor
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
    graph.output(graph.graph_copy(program.graph, new := {}))
    graph.output_node().meta.update(program.graph.output_node().meta)
    for node in graph.nodes:
        part = _first_part(node)
        if part is not None:
            node.replace_all_uses_with(part)
    names = {old.name: copy.name for old, copy in new.items()}
    assert all(old == copy for old, copy in names.items()), "names survive a copy"
    attributes = attributes_of(program.gm, graph)
    program.gm = graph_module(program.model, attributes, graph, "Captured")
    program.gm.graph.eliminate_dead_code()
    program.gm.recompile()


def _first_part(node: fx.Node) -> fx.Node | None:
    if node.target is not _SLICE:
        return None
    source, dim, start, end, step = [*node.args, *(None, 0, 0, sys.maxsize, 1)[len(node.args) :]]
    if not isinstance(source, fx.Node) or source.target is not _CAT or (start, step) != (0, 1):
        return None
    parts = source.args[0]
    along = source.args[1] if len(source.args) > 1 else 0
    first = parts[0] if isinstance(parts, (list, tuple)) else None
    spec = spec_of(first) if isinstance(first, fx.Node) else None
    if spec is None or along != dim or spec.shape[dim] != end:
        return None
    return first
