"""What must hold of a program between any two passes."""

from __future__ import annotations

import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.program import BLOCK, Program


def verify(program: Program) -> None:
    """Raise `VerifyError` where an invariant is broken.

    The graph is well formed; its placeholders are the call's tensors in order; every module and
    attribute that it names is there; nothing changes a tensor in place; a block is in at most one
    run, and every value of a run is a node of the graph.
    """
    graph = program.graph
    try:
        graph.lint()
    except Exception as error:
        raise VerifyError(f"the graph is malformed: {error}") from error
    inputs = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    if inputs != program.inputs:
        raise VerifyError(f"the graph takes {inputs}, the call gives {program.inputs}")
    for node in graph.nodes:
        _verify_node(node)
    _verify_regions(program)


def _verify_node(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        raise VerifyError(f"{node.name} changes a tensor in place: {target}")


def _verify_regions(program: Program) -> None:
    names = {n.name for n in program.graph.nodes}
    seen: set[object] = set()
    for region in program.regions:
        if seen & set(region.blocks):
            raise VerifyError(f"a block is in two runs: {sorted(map(str, region.blocks))}")
        seen |= set(region.blocks)
        if len(region.inputs) != len(region.values):
            raise VerifyError(f"run {region.index} has {len(region.values)} values")
        missing = [v for v in region.values if v not in names]
        if missing:
            raise VerifyError(f"run {region.index}: no node is called {missing}")
    listed = {c.meta[BLOCK].list_name for c in program.block_calls()}
    if not listed <= set(program.block_lists):
        raise VerifyError(f"blocks of unknown lists: {sorted(listed)}")
