"""Find the trunk among the captured module lists: the blocks to cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from dit_cache_fx.capture.leaves import BlockList
from dit_cache_fx.errors import DiscoveryError
from dit_cache_fx.ir.node_meta import BlockId, mark
from dit_cache_fx.ir.nodes import block_values, own_leaves, spec_of
from dit_cache_fx.ir.program import Program


@dataclass(frozen=True)
class _Found:
    """A called list: its calls, the arguments they depend on, and the reason if it is not trunk."""

    blocks: BlockList
    calls: tuple[fx.Node, ...]
    needs: frozenset[str]
    fault: str | None

    def parameters(self, program: Program) -> int:
        """Return the number of its members' tensors among the inputs of the graph."""
        given = {n for c in self.calls for n in c.all_input_nodes if n.name in program.owned}
        own = sum(p.numel() for m in self.blocks.modules for p in m.parameters())
        return own + sum(spec.numel() for n in given if (spec := spec_of(n)) is not None)


def mark_blocks(program: Program, lists: Sequence[BlockList], chosen: bool) -> None:
    """Find the trunk among `lists`, and mark each of its calls with its block.

    `chosen`: the user named the lists, so all of them are trunk. Otherwise a list is trunk if its
    blocks have several layers, carry a tensor through (an output has an input's shape), depend on
    the noisy sample, and depend on every argument that the largest such list reads. So a text
    refiner is not trunk (no sample), nor is a refiner that runs on the sample before the text joins
    it.

    Raises `DiscoveryError` with the candidates if there is no trunk.
    """
    needs = program.needs()
    program.sample = program.sample or _sample(program)
    found = [_look(program, blocks, needs, program.sample) for blocks in lists]
    called = [f for f in found if f.calls]
    trunk = called if chosen else _trunk(program, called, needs)
    missing = [f.blocks.name for f in found if chosen and not f.calls]
    if missing or not trunk:
        raise DiscoveryError(_explain(found, missing))
    for f in sorted(trunk, key=lambda f: _position(program, f.calls[0])):
        program.block_lists[f.blocks.name] = len(f.blocks.modules)
        made: dict[int, int] = {}
        for call in f.calls:
            index = int(str(call.target).rpartition(".")[2])
            mark(call, block=BlockId(f.blocks.name, index, made.get(index, 0)))
            made[index] = made.get(index, 0) + 1
    program.beside = _beside(program)


def _look(
    program: Program, blocks: BlockList, needs: dict[fx.Node, frozenset[str]], sample: str | None
) -> _Found:
    targets = {f"model.{blocks.name}.{i}" for i in range(len(blocks.modules))}
    calls = tuple(n for n in program.graph.find_nodes(op="call_module") if n.target in targets)
    union = frozenset().union(*(needs[c] for c in calls))
    return _Found(blocks, calls, union, _fault(blocks, calls, union, sample))


def _fault(
    blocks: BlockList, calls: Sequence[fx.Node], needs: frozenset[str], sample: str | None
) -> str | None:
    if not calls:
        return "never called"
    if sample is not None and sample not in needs:
        return f"does not depend on {sample!r}"
    if not is_composite(blocks):
        return "its members are single layers"
    if not all(_carries_stream(c) for c in calls):
        return "no output has the shape of an input"
    return None


def _trunk(
    program: Program, called: Sequence[_Found], needs: dict[fx.Node, frozenset[str]]
) -> list[_Found]:
    sound = [f for f in called if f.fault is None]
    if not sound:
        return []
    main = max(sound, key=lambda f: f.parameters(program))
    start = needs[main.calls[0]]
    return [f for f in sound if f is main or f.needs >= start]


def is_composite(blocks: BlockList) -> bool:
    """Return whether the members have several layers."""
    return all(next(module.children(), None) is not None for module in blocks.modules)


def _carries_stream(call: fx.Node) -> bool:
    given = [node for _, node in own_leaves(call)]
    inputs = {spec.shape for n in given if (spec := spec_of(n)) is not None}
    outputs = [spec for n in block_values(call) if (spec := spec_of(n)) is not None]
    return any(spec.ndim > 1 and spec.shape in inputs for spec in outputs)


def _sample(program: Program) -> str | None:
    """Return the argument with the noisy sample: shaped like the output, or the first one."""
    inputs = [
        (program.node(name), argument)
        for name, argument in zip(program.inputs, program.arguments, strict=True)
        if name != program.timestep_input and name not in program.owned
    ]
    output = program.graph.output_node().all_input_nodes
    shape = spec.shape if output and (spec := spec_of(output[0])) is not None else None
    for node, argument in inputs:
        spec = spec_of(node)
        if spec is not None and spec.ndim > 1 and spec.shape == shape:
            return argument
    return inputs[0][1] if inputs else None


def _beside(program: Program) -> frozenset[str]:
    """Return the arguments shaped like the model's further results: more samples."""
    results = program.outputs_of_blocks()[1:]
    others = [spec for n in results if (spec := spec_of(n)) is not None]
    given = {
        argument: spec
        for name, argument in zip(program.inputs, program.arguments, strict=True)
        if name != program.timestep_input
        and name not in program.owned
        and argument != program.sample
        if (spec := spec_of(program.node(name))) is not None and spec.ndim > 1
        if program.arguments.count(argument) == 1
    }
    found = set[str]()
    for other in others:  # of one shape, perhaps: the entries of a list
        argument = _given_as(given, other)
        if argument is not None:
            del given[argument]
            found.add(argument)
    return frozenset(found)


def _given_as(given: Mapping[str, torch.Tensor], result: torch.Tensor) -> str | None:
    """The argument of a result's form; autocast gives floating results another dtype."""
    alike = [a for a, own in given.items() if own.shape == result.shape]
    same = [a for a in alike if given[a].dtype == result.dtype]
    floating = [a for a in alike if given[a].is_floating_point() and result.is_floating_point()]
    return next(iter([*same, *floating]), None)


def _position(program: Program, node: fx.Node) -> int:
    return list(program.graph.nodes).index(node)


def _explain(found: Sequence[_Found], missing: Sequence[str]) -> str:
    if missing:
        return f"blocks={list(missing)!r}: the model did not call these lists in this call"
    lines = [f"  {f.blocks.name} ({len(f.blocks.modules)}): {f.fault}" for f in found]
    listing = "\n".join(lines) or "  (the model holds no nn.ModuleList)"
    return (
        "no block list found. Name it: blocks=['...'] (attribute path of an nn.ModuleList whose "
        f"members the model calls). Candidates:\n{listing}"
    )
