"""Rule signals outside of blocks: the sample, and the residual of the model's first blocks."""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import fx

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.node_meta import mark, mark_tensor
from dit_cache_fx.ir.nodes import block_values, device_of, spec_of
from dit_cache_fx.ir.program import Program
from dit_cache_fx.ir.streams import sample_like_output, stream_input, unchanged
from dit_cache_fx.strategies import Strategy


def mark_sample(program: Program, cache_name: str) -> None:
    """Use the model's sample as the signal, in the shape of the output."""
    mark(sample_like_output(program), signal=True)


def mark_residual(program: Program, strategy: Strategy) -> None:
    """Use the residual of the first blocks, which always run, as the signal.

    Before, with one such block:

        %b0 = call_module[model.blocks.0](%x, %temb)
        %b1 = call_module[model.blocks.1](%b0, %temb)

    After:

        %b0 = call_module[model.blocks.0](%x, %temb)
        %sub = aten.sub(%b0, %x)
        %b1 = call_module[model.blocks.1](%b0, %temb)
    """
    calls = program.block_calls()
    positions = takewhile(lambda i: strategy.always_runs(i, len(calls)), range(len(calls)))
    leading = [calls[i] for i in positions]
    stream = stream_input(program, calls[0], strategy.stream_name())
    if not leading or stream is None:
        why = "no block at the model's head always runs" if stream is not None else "no stream"
        raise CaptureError(f"the rule's signal ('residual') cannot be found: {why}")
    following = calls[len(leading)] if len(leading) < len(calls) else None
    stream = unchanged(stream)  # a block may change its input in place
    after = _stream_after(program, leading[-1], stream, following, strategy.stream_name())
    with program.graph.inserting_after(after):
        residual = program.graph.call_function(torch.ops.aten.sub.Tensor, (after, stream))
    mark_tensor(residual, spec_of(stream), device_of(stream))
    mark(residual, signal=True)


def _stream_after(
    program: Program, call: fx.Node, stream: fx.Node, following: fx.Node | None, name: str
) -> fx.Node:
    """Return the result of a block that continues `stream`: the next block's stream."""
    like = spec_of(stream)
    found = [
        value
        for value in block_values(call)
        if (spec := spec_of(value)) is not None and like is not None and spec.shape == like.shape
    ]
    taken = None if following is None else stream_input(program, following, name)
    taken = taken and unchanged(taken)
    if not found:
        raise CaptureError(
            "the rule's signal ('residual') cannot be found: no result of "
            f"{call.target} has the shape of the stream {stream.name}"
        )
    return taken if taken in found else found[0]
