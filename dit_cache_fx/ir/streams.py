"""Find the run input of a run's value: the same stream before the run."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import fx

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.node_meta import block_of, mark_tensor, meta_of
from dit_cache_fx.ir.nodes import (
    Slot,
    block_call_of,
    block_values,
    descendants,
    device_of,
    own_leaves,
    spec_of,
)
from dit_cache_fx.ir.program import Program, Region


def run_input_of(
    program: Program, region: Region, value: fx.Node, cache_name: str, every: bool = False
) -> fx.Node | None:
    """Return the first block's input that `value` continues; None if there is none.

    Only the tracked stream has one: an input of `value`'s shape that depends on the noisy sample,
    called `cache_name` if the block has an argument of that name. A value that the block list wires
    to another argument (text rows) does not belong to it; with `every` that argument is its run
    input.
    """
    first = next(c for c in program.block_calls() if block_of(c) == region.blocks[0])
    list_name = block_of(first).list_name
    opening = next(c for c in program.block_calls() if block_of(c).list_name == list_name)
    tracked = _tracked_slot(program, opening, cache_name)
    wired = _wired_slot(program, value, first)
    if wired is not None and tracked is not None and wired != tracked:
        given = dict(own_leaves(first)).get(wired) if every else None
        return unchanged(given) if given and _shape(given) == _shape(value) else None
    spec = spec_of(value)
    found = _candidates(program, first, set() if spec is None else {spec.shape})
    slot = next((s for s in (tracked, wired, *found) if s is not None and s in found), None)
    return None if slot is None else unchanged(found[slot])


def unchanged(node: fx.Node) -> fx.Node:
    """Return the node's values before blocks change them in place: the block gets a copy."""
    while node.target is torch.ops.aten.clone.default:
        node = node.all_input_nodes[0]
    return node


def stream_input(program: Program, call: fx.Node, cache_name: str) -> fx.Node | None:
    """Return the input of a block call that carries the sample's stream."""
    slot = _tracked_slot(program, call, cache_name)
    return None if slot is None else dict(own_leaves(call))[slot]


def _tracked_slot(program: Program, call: fx.Node, cache_name: str) -> Slot | None:
    shapes = {spec.shape for v in block_values(call) if (spec := spec_of(v)) is not None}
    found = _candidates(program, call, shapes)
    return next((s for s in (*_named_slots(program, call, cache_name), *found) if s in found), None)


def _candidates(program: Program, call: fx.Node, shapes: set[torch.Size]) -> dict[Slot, fx.Node]:
    """Return a block call's inputs of one of these shapes that depend on the noisy sample."""
    needs = program.needs()
    return {
        slot: node
        for slot, node in own_leaves(call)
        if _shape(node) in shapes and (program.sample is None or program.sample in needs[node])
    }


def padded_run_input(
    program: Program, region: Region, value: fx.Node, cache_name: str
) -> fx.Node | None:
    """Return the run input of a joined `value`: the stream, padded with zeros for other rows.

    If the run concatenates its stream with another (image and text rows), `value - run_input` is a
    residual in the stream's rows and the value itself in the others. The padded stream is added to
    the graph. None if the run joins nothing.
    """
    first = next(c for c in program.block_calls() if block_of(c) == region.blocks[0])
    run_input = stream_input(program, first, cache_name)
    joined, spec = spec_of(value), None if run_input is None else spec_of(run_input)
    if run_input is None or spec is None or joined is None or joined.ndim != spec.ndim:
        return None
    run_input = unchanged(run_input)
    inside = descendants([first])
    cat = torch.ops.aten.cat.default
    for node in program.graph.find_nodes(op="call_function", target=cat):
        if node in inside:
            offset = _offset(node, spec.shape)
            if _shape(node) == joined.shape and offset is not None:
                return _pad(program, first, run_input, joined.shape, *offset)
    return None


def sample_like_output(program: Program) -> fx.Node:
    """Return the sample in the shape of the model's output, so that the two can be compared.

    If one dimension differs, the sample is cut (a conditioning picture follows it in the channels)
    or padded with zeros (the output has a variance too). Such a node is added to the graph. Raises
    `CaptureError` if the shapes differ in another way.
    """
    named = zip(program.inputs, program.arguments, strict=True)
    samples = [name for name, argument in named if argument == program.sample]
    outputs = program.outputs_of_blocks()
    if len(samples) != 1 or len(outputs) != 1:
        raise CaptureError(
            f"the sample and the output must be one tensor each; found {samples} and "
            f"{[n.name for n in outputs]}"
        )
    sample = program.node(samples[0])
    shape, wanted = _shape(sample), _shape(outputs[0])
    unlike = [i for i, (a, b) in enumerate(zip(shape, wanted, strict=False)) if a != b]
    if len(shape) != len(wanted) or len(unlike) > 1 or 0 in unlike:
        raise CaptureError(
            f"the output, of shape {list(wanted)}, cannot be compared with the sample "
            f"{sample.name}, of shape {list(shape)}"
        )
    if not unlike:
        return sample
    before = next(n for n in program.graph.nodes if n.op != "placeholder")
    return _pad(program, before, sample, wanted, unlike[0], 0)


def _offset(cat: fx.Node, shape: torch.Size) -> tuple[int, int] | None:
    """Return the dimension of a concatenation, and the offset of its part of this shape."""
    parts: Any = cat.args[0]
    dim: Any = cat.args[1] if len(cat.args) > 1 else 0
    begin = 0
    for part in parts:
        if _shape(part) == shape:
            return dim % len(shape), begin
        begin += _shape(part)[dim]
    return None


def _pad(
    program: Program, before: fx.Node, run_input: fx.Node, shape: torch.Size, dim: int, begin: int
) -> fx.Node:
    spec = spec_of(run_input)
    assert spec is not None
    after = shape[dim] - spec.shape[dim] - begin
    padding = [0, 0] * (len(shape) - 1 - dim) + [begin, after]  # last dimension first
    with program.graph.inserting_before(before):
        padded = program.graph.call_function(
            torch.ops.aten.constant_pad_nd.default, (run_input, padding, 0)
        )
    mark_tensor(padded, spec.new_empty(shape), device_of(run_input))
    return padded


def _shape(node: fx.Node) -> Any:
    spec = spec_of(node)
    return None if spec is None else spec.shape


def _named_slots(program: Program, call: fx.Node, name: str) -> list[Slot]:
    """Return the slots of the block's parameter `name`, or of a container's part of that name."""
    module = program.gm.get_submodule(str(call.target))
    parameters = list(inspect.signature(module.forward).parameters)
    place = parameters.index(name) if name in parameters else None
    return [slot for slot, _ in own_leaves(call) if slot[-1] == name or slot == (place,)]


def _wired_slot(program: Program, value: fx.Node, first: fx.Node) -> Slot | None:
    """Return the slot that takes this output of a block in the next block of the list."""
    path = meta_of(value).path
    list_name = block_of(block_call_of(value)).list_name
    if path is None or list_name != block_of(first).list_name:
        return None
    calls = [c for c in program.block_calls() if block_of(c).list_name == list_name]
    for before, after in itertools.pairwise(calls):
        outputs = [v for v in block_values(before) if meta_of(v).path == path]
        for slot, node in own_leaves(after):
            if node in outputs:
                return slot
    return None
