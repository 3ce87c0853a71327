"""The value that a strategy's own rule looks at: the first block's modulated input.

A block is one node of the program. For this value its inside is looked at once: what the block
computes for its first part that sees both the stream and the conditioning (an attention, behind an
adaptive norm) is added to the program, beside the block itself.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from dit_cache_fx.capture.normal_form import translated
from dit_cache_fx.capture.record import ModuleCall, Recording
from dit_cache_fx.capture.trace import Trace, call_kept, trace
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.program import (
    SIGNAL,
    Program,
    ancestors,
    argument_leaves,
    attributes_of,
    descendants,
    graph_module,
)
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.streams import stream_input
from dit_cache_fx.structure import unflatten


def parts_of(block: nn.Module, name: str) -> dict[nn.Module, str]:
    """The modules inside a block, with their names; of nested ones the outer call counts."""
    return {m: f"{name}.{key}" for key, m in block.named_modules() if m is not block}


def mark_signal(program: Program, strategy: Strategy, recording: Recording) -> None:
    """Find what the strategy's own rule looks at, where it has one."""
    if not strategy.has_rule:
        return
    if strategy.looks_at() == "input":
        mark_input(program, strategy.stream_name())
        return
    name = str(program.block_calls()[0].target).removeprefix("model.")
    made = next(c for c in recording.calls if c.name == name)
    mark_modulated(program, made, strategy.stream_name())
    for call in recording.calls:
        call.inside = None


def mark_input(program: Program, cache_name: str) -> None:
    """Take the first block's input as the signal."""
    first = program.block_calls()[0]
    stream = stream_input(program, first, cache_name)
    if stream is None:
        raise _unknown("the first block has no input of the shape of its output")
    stream.meta[SIGNAL] = True


def mark_modulated(program: Program, made: ModuleCall, cache_name: str) -> None:
    """Add the first block's modulated input to the program and take it as the signal.

    `made`: the recorded call of that block, with its inside. A block without conditioning has no
    adaptive norm: then its input is the signal.
    """
    first = program.block_calls()[0]
    stream = stream_input(program, first, cache_name)
    if stream is None or made.inside is None:
        raise _unknown("the first block has no input of the shape of its output")
    inside = made.inside
    arguments = [node for _, node in argument_leaves(first)]
    if len(arguments) != len(inside.tensors):
        raise _unknown("the first block takes arguments that are not tensors in containers")
    conditioning = [n for n in arguments if n is not stream and _timed(program, n)]
    if not conditioning:
        stream.meta[SIGNAL] = True
        return

    def run(tensors: Any) -> Any:
        args, kwargs = unflatten(inside.skeleton, tensors)
        return inside.block.forward(*args, **kwargs)

    traced = trace(run, inside.tensors, inside.parts, inside.recording)
    if traced.read:
        raise _unknown("the first block's control flow depends on data")
    places = [n for n in traced.gm.graph.nodes if n.op == "placeholder"]
    given = dict(zip(places, arguments, strict=True))
    _add(program, traced, given, _modulated(traced, given, stream, conditioning), first)


def _modulated(
    traced: Trace, given: dict[fx.Node, fx.Node], stream: fx.Node, conditioning: list[fx.Node]
) -> fx.Node:
    """The first value passed to a part of the block that depends on stream and conditioning."""
    of_stream = descendants(p for p, n in given.items() if n is stream)
    of_both = of_stream & descendants(p for p, n in given.items() if n in conditioning)
    for node in traced.gm.graph.nodes:
        if node.target is call_kept:
            value: fx.Node | None = next((n for n in node.all_input_nodes if n in of_both), None)
            if value is not None:
                return value
    raise _unknown("no part of the first block takes a value that stream and timestep made")


def _add(
    program: Program,
    traced: Trace,
    given: dict[fx.Node, fx.Node],
    value: fx.Node,
    before: fx.Node,
) -> None:
    attributes = attributes_of(program.gm, program.graph)
    needed = ancestors([value], stop=given)
    with program.graph.inserting_before(before):
        new = translated(program.model, traced, program.graph, attributes, given, needed)
    new[value].meta[SIGNAL] = True
    program.gm = graph_module(program.model, attributes, program.graph, "Captured")


def _timed(program: Program, node: fx.Node) -> bool:
    if program.timestep is None:
        raise _unknown("the graph does not take the timestep")
    timestep = program.arguments[program.inputs.index(program.timestep)]
    return timestep in program.needs()[node]


def _unknown(reason: str) -> CaptureError:
    return CaptureError(
        f"the first block's modulated input cannot be found: {reason}. Use signal='input'"
    )
