"""What a run's value starts from: the same stream where the run begins."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dit_cache_fx.program import (
    BLOCK,
    OUTPUT,
    Program,
    Region,
    block_call_of,
    block_values,
    spec_of,
)

#: a block's argument: its place among the positional ones, or its keyword
Slot = int | str


def start_of(program: Program, region: Region, value: fx.Node, cache_name: str) -> fx.Node | None:
    """The first block's input that `value` continues; None where there is none.

    Among the inputs of `value`'s shape that depend on the noisy sample: the one called
    `cache_name`; else the one that the block list wires this output to; else the first.
    """
    first = next(c for c in program.block_calls() if c.meta[BLOCK] == region.blocks[0])
    spec = spec_of(value)
    shapes = set() if spec is None else {spec.shape}
    return _choose(program, first, shapes, cache_name, _wired_slot(program, value, first))


def stream_input(program: Program, call: fx.Node, cache_name: str) -> fx.Node | None:
    """The input of a block call that carries the sample's stream through it."""
    shapes = {spec.shape for v in block_values(call) if (spec := spec_of(v)) is not None}
    return _choose(program, call, shapes, cache_name, None)


def _choose(
    program: Program, call: fx.Node, shapes: set[torch.Size], name: str, wired: Slot | None
) -> fx.Node | None:
    needs = program.needs()
    found = {
        slot: node
        for slot, node in _tensor_arguments(call)
        if _shape(node) in shapes and (program.sample is None or program.sample in needs[node])
    }
    for slot in (*_named_slots(program, call, name), wired, *found):
        if slot is not None and slot in found:
            return found[slot]
    return None


def _tensor_arguments(call: fx.Node) -> Iterator[tuple[Slot, fx.Node]]:
    arguments: list[tuple[Slot, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for slot, argument in arguments:
        if isinstance(argument, fx.Node) and spec_of(argument) is not None:
            yield slot, argument


def _shape(node: fx.Node) -> Any:
    spec = spec_of(node)
    return None if spec is None else spec.shape


def _named_slots(program: Program, call: fx.Node, name: str) -> list[Slot]:
    """The slots that could be the block's parameter `name`: its keyword and its position."""
    module = program.gm.get_submodule(str(call.target))
    parameters = list(inspect.signature(module.forward).parameters)
    return [name, parameters.index(name)] if name in parameters else [name]


def _wired_slot(program: Program, value: fx.Node, first: fx.Node) -> Slot | None:
    """The slot that this output of a block goes to where two blocks of the list follow."""
    index = value.meta.get(OUTPUT)
    list_name = block_call_of(value).meta[BLOCK].list_name
    if index is None or list_name != first.meta[BLOCK].list_name:
        return None
    calls = [c for c in program.block_calls() if c.meta[BLOCK].list_name == list_name]
    for before, after in itertools.pairwise(calls):
        outputs = [v for v in block_values(before) if v.meta[OUTPUT] == index]
        for slot, node in _tensor_arguments(after):
            if node in outputs:
                return slot
    return None
