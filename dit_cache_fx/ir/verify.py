"""Check the invariants of a program between passes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dit_cache_fx.errors import VerifyError
from dit_cache_fx.ir.cached_run import CachedRun, cached_runs
from dit_cache_fx.ir.copying import results_of
from dit_cache_fx.ir.names import CLOCK_NAMES, is_reserved
from dit_cache_fx.ir.node_meta import block_of, meta_of
from dit_cache_fx.ir.program import Program, Region


def verify(program: Program) -> None:
    """Raise `VerifyError` if an invariant is broken.

    The graph is well formed. Its placeholders are the call's tensors, in order. Every module and
    attribute that it names exists. Nothing changes a tensor in place. No node has a reserved name.
    A block is in at most one run, and every value of a run is a node of the graph. The two sides of
    a run are graphs of the same kind, with the operands and results of the run. The metadata of
    nodes (`NodeMeta`) is on the right nodes.
    """
    graph = program.graph
    _verify_graph(program.gm, "")
    inputs = tuple(n.name for n in graph.find_nodes(op="placeholder"))
    if inputs != program.inputs:
        raise VerifyError(f"the graph takes {inputs}, the call gives {program.inputs}")
    reserved = [n.name for n in graph.nodes if is_reserved(n.name)]
    if reserved:
        raise VerifyError(f"{reserved} are reserved names")
    _verify_regions(program)
    for run in cached_runs(graph):
        _verify_run(program, run)


def _verify_graph(gm: fx.GraphModule, where: str) -> None:
    try:
        gm.graph.lint()
    except Exception as error:
        raise VerifyError(f"{where}the graph is malformed: {error}") from error
    for node in gm.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise VerifyError(f"{where}{node.name} changes a tensor in place: {target}")
        if node.op in ("get_attr", "call_module") and not _is_there(gm, str(target)):
            raise VerifyError(f"{where}{node.name} reads {target}, which does not exist")
        _verify_meta(node, where)
    if sum(meta_of(node).signal for node in gm.graph.nodes) > 1:
        raise VerifyError(f"{where}more than one value is the rule's signal")


def _verify_meta(node: fx.Node, where: str) -> None:
    meta = meta_of(node)
    if meta.block is not None and node.op != "call_module":
        raise VerifyError(f"{where}{node.name} is marked as a call of {meta.block}, and is no call")
    parts = [*node.kwargs.values()] or node.args[1:]
    if meta.keys is not None and len(meta.keys) != len(parts):
        raise VerifyError(f"{where}{node.name} has {len(parts)} parts and {len(meta.keys)} keys")


def _is_there(gm: fx.GraphModule, target: str) -> bool:
    value: Any = gm
    for name in target.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def _verify_regions(program: Program) -> None:
    names = {n.name for n in program.graph.nodes}
    seen: set[object] = set()
    for region in program.regions:
        if seen & set(region.blocks):
            raise VerifyError(f"a block is in two runs: {sorted(map(str, region.blocks))}")
        seen |= set(region.blocks)
        if len(region.run_inputs) != len(region.values):
            raise VerifyError(f"run {region.index} has {len(region.values)} values")
        missing = [v for v in region.values if v not in names]
        if missing:
            raise VerifyError(f"run {region.index}: no node is called {missing}")
    listed = {block_of(c).list_name for c in program.block_calls()}
    if not listed <= set(program.block_lists):
        raise VerifyError(f"blocks of unknown lists: {sorted(listed)}")


# --- a run and its two sides ---------------------------------------------------------------------


def _verify_run(program: Program, run: CachedRun) -> None:
    where = f"run {run.index}: "
    region = next((r for r in program.regions if r.index == run.index), None)
    if region is None:
        raise VerifyError(f"{where}there is no such region")
    _verify_results(run, region, where)
    compute, reuse = (_side(program, name, where) for name in (run.compute, run.reuse))
    taken = [len(side.graph.find_nodes(op="placeholder")) for side in (compute, reuse)]
    cached = taken[1] - len(CLOCK_NAMES) - len(run.run_inputs)
    if cached < 0 or cached % max(len(region.values), 1):
        raise VerifyError(
            f"{where}its reuse side takes {taken[1]} operands: no number of cached tensors fits "
            f"{len(region.values)} values, the clock and {len(run.run_inputs)} run inputs"
        )
    if taken[0] != taken[1] + len(run.operands):
        raise VerifyError(
            f"{where}its compute side takes {taken[0]} operands, {taken[1] + len(run.operands)} "
            "are given"
        )
    _verify_gives(compute, len(region.values) + cached, f"{where}its compute side")
    _verify_gives(reuse, len(region.values), f"{where}its reuse side")


def _verify_results(run: CachedRun, region: Region, where: str) -> None:
    """Check that the items taken from a run's node are the region's values, by name and index."""
    for user in run.node.users:
        place = user.args[1] if user.target is operator.getitem else None
        named = isinstance(place, int) and 0 <= place < len(region.values)
        if not named or region.values[place] != user.name:  # type: ignore[index]
            raise VerifyError(f"{where}{user.name} is none of its values {list(region.values)}")


def _side(program: Program, name: str, where: str) -> fx.GraphModule:
    side = getattr(program.gm, name, None)
    if not isinstance(side, fx.GraphModule):
        raise VerifyError(f"{where}{name} is no graph")
    if cached_runs(side.graph):
        raise VerifyError(f"{where}{name} contains a run")
    _verify_graph(side, f"{where}{name}: ")
    return side


def _verify_gives(side: fx.GraphModule, expected: int, what: str) -> None:
    results = results_of(side.graph)
    if len(results) != expected or not all(isinstance(n, fx.Node) for n in results):
        raise VerifyError(f"{what} gives {len(results)} results, {expected} expected")
