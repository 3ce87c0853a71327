"""Find the signal of a strategy's rule: the first block's modulated input, or another value.

A block is one node of the program. To find its modulated input, its inside is traced once: the
block's computation up to the first part that depends on both stream and conditioning (an attention
after an adaptive norm) is added to the program, beside the block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from dit_cache_fx.capture.normal_form import translated
from dit_cache_fx.capture.outer_signal import mark_residual, mark_sample
from dit_cache_fx.capture.recording import RecordedCall, Recording
from dit_cache_fx.capture.trace import Trace, call_leaf, trace
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.node_meta import mark
from dit_cache_fx.ir.nodes import (
    ancestors,
    argument_leaves,
    descendants,
    module_name,
    own_leaves,
    spec_of,
    tensor_spec,
)
from dit_cache_fx.ir.program import Program
from dit_cache_fx.ir.streams import stream_input, unchanged
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.strategies.signals import value_of
from dit_cache_fx.values.pytree import unflatten

_NO_STREAM = "the first block has no input of the shape of its output"


def parts_of(block: nn.Module, name: str) -> dict[nn.Module, str]:
    """Return the outermost modules inside a block, with their names."""
    return {m: f"{name}.{key}" for key, m in block.named_modules() if m is not block}


def mark_input(program: Program, cache_name: str) -> None:
    """Use the first block's input as the signal."""
    first = program.block_calls()[0]
    stream = stream_input(program, first, cache_name)
    if stream is None:
        raise _unknown("input", _NO_STREAM)
    mark(unchanged(stream), signal=True)


def mark_conditioning(program: Program, cache_name: str) -> None:
    """Use the first block's conditioning as the signal: its smallest argument of the timestep."""
    mark(_conditioning(program, cache_name), signal=True)


def mark_embedding(program: Program, cache_name: str) -> None:
    """Use the timestep's embedding: the last value that depends on it alone and conditions blocks.

    If the layers after the blocks are conditioned too, it is the last common ancestor of both.
    """
    made_from = ancestors([_conditioning(program, cache_name)])
    calls = program.block_calls()
    of_blocks = descendants(calls)
    read_after = {i for n in of_blocks - ancestors(calls) for i in n.all_input_nodes} - of_blocks
    shared = made_from & ancestors(read_after)
    needs, timestep = program.needs(), _timestep_argument(program)
    alone = [n for n in program.graph.nodes if needs[n] == {timestep} and n.op != "placeholder"]
    found = [n for n in alone if n in shared] or [n for n in alone if n in made_from]
    if not found:
        raise _unknown(
            "embedding", "the first block has no conditioning that depends on the timestep alone"
        )
    mark(found[-1], signal=True)


#: signals that need no look inside the first block
MARKS: Mapping[str, Callable[[Program, str], None]] = MappingProxyType(
    {
        "input": mark_input,
        "conditioning": mark_conditioning,
        "embedding": mark_embedding,
        "sample": mark_sample,
    }
)


def mark_signal(program: Program, strategy: Strategy, recording: Recording) -> None:
    """Find the signal of the strategy's rule, if it has one."""
    value = value_of(strategy)
    if value is None:
        return
    if value == "modulated":
        _mark_inside(program, strategy, recording)
    elif value == "residual":
        mark_residual(program, strategy)
    else:
        MARKS[value](program, strategy.stream_name())


def _mark_inside(program: Program, strategy: Strategy, recording: Recording) -> None:
    name = module_name(program.block_calls()[0])
    made = next(c for c in recording.calls if c.name == name)
    mark_modulated(program, made, strategy.stream_name())
    for call in recording.calls:
        call.inside = None


def mark_modulated(program: Program, made: RecordedCall, cache_name: str) -> None:
    """Add the first block's modulated input to the program, and use it as the signal.

    `made`: the recorded call of that block, with its inside. A block without conditioning has no
    adaptive norm: then its input is the signal.
    """
    first = program.block_calls()[0]
    stream = stream_input(program, first, cache_name)
    if stream is None or made.inside is None:
        raise _unknown("modulated", _NO_STREAM)
    inside = made.inside
    arguments = [node for _, node in argument_leaves(first)]
    whole = dict(zip([n for _, n in own_leaves(first)], arguments, strict=True))
    if len(arguments) != len(inside.tensors):
        raise _unknown(
            "modulated", "the first block takes arguments that are not tensors in containers"
        )
    conditioning = [n for n in arguments if n is not whole[stream] and _timed(program, n)]
    if not conditioning:
        mark(unchanged(stream), signal=True)
        return

    def run(tensors: Any) -> Any:
        args, kwargs = unflatten(inside.skeleton, tensors)
        return inside.block.forward(*args, **kwargs)

    traced = trace(run, inside.tensors, inside.parts, inside.recording)
    if traced.read:
        raise _unknown("modulated", "the first block's control flow depends on data")
    places = traced.gm.graph.find_nodes(op="placeholder")
    given = dict(zip(places, arguments, strict=True))
    _add(program, traced, given, _modulated(traced, given, whole[stream], conditioning), first)


def _modulated(
    traced: Trace, given: dict[fx.Node, fx.Node], stream: fx.Node, conditioning: list[fx.Node]
) -> fx.Node:
    """Return the first argument of a part of the block that depends on stream and conditioning."""
    of_stream = descendants(p for p, n in given.items() if n is stream)
    of_both = of_stream & descendants(p for p, n in given.items() if n in conditioning)
    for call in traced.gm.graph.find_nodes(op="call_function", target=call_leaf):
        value: fx.Node | None = next((n for n in call.all_input_nodes if n in of_both), None)
        if value is not None:
            return value
    raise _unknown(
        "modulated", "no part of the first block takes a value that depends on stream and timestep"
    )


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
    mark(new[value], signal=True)
    program.gm = graph_module(program.model, attributes, program.graph, "Captured")


def _conditioning(program: Program, cache_name: str) -> fx.Node:
    first = program.block_calls()[0]
    stream = stream_input(program, first, cache_name)
    arguments = [node for _, node in own_leaves(first)]
    others = [n for n in arguments if n is not stream and spec_of(n) is not None]
    timed = [n for n in others if _timed(program, n)]
    if not timed:
        raise _unknown(
            "conditioning", "the first block takes no value that depends on the timestep"
        )
    return min(timed, key=lambda node: tensor_spec(node).nbytes)


def _timed(program: Program, node: fx.Node) -> bool:
    return _timestep_argument(program) in program.needs()[node]


def _timestep_argument(program: Program) -> str:
    if program.timestep_argument is None:
        raise CaptureError("the graph does not take the timestep: use signal='input'")
    return program.timestep_argument


def _unknown(signal: str, reason: str) -> CaptureError:
    other = "another signal" if signal == "input" else "signal='input'"
    return CaptureError(f"the rule's signal ({signal!r}) cannot be found: {reason}. Use {other}")
