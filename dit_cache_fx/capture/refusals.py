"""Refuse models whose cached steps could not behave like the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dit_cache_fx.capture.normal_form import Guards, data_reads, owned_tensors
from dit_cache_fx.capture.recording import Recording
from dit_cache_fx.capture.signature import FlatCall
from dit_cache_fx.errors import CaptureError, DiscoveryError
from dit_cache_fx.ir.nodes import inputs_behind
from dit_cache_fx.ir.program import Program
from dit_cache_fx.values.identity import storage_key

_APART = (
    "a cached step could not do the same. Make such calls between disable() and enable(), turn "
    "off the option that causes it (a cache of keys and values, for example), or let the module "
    "return the value instead"
)


def require_timestep(call: FlatCall, timestep_argument: str) -> None:
    """Refuse a call whose timestep is not one tensor or number."""
    if call.arguments_of().count(timestep_argument) != 1:
        raise DiscoveryError(
            f"the timestep argument {timestep_argument!r} must be one tensor or number; in this "
            "call it is not. Name another one: timestep='...'"
        )


def refuse_read_number(call: FlatCall, program: Program, guards: Guards | None) -> None:
    """Refuse a model whose own code computes with the value of a number as timestep.

    The result would be a constant of the graph: every step would need a new capture.
    """
    if call.number is None or guards is None:
        return
    for node, value in zip(data_reads(guards.gm.graph), guards.expected, strict=True):
        given = {n.name for n in inputs_behind(node)}
        if program.timestep_input in given and not isinstance(value, (bool, torch.Size)):
            raise CaptureError(
                "the model's own code computes with the value of the timestep "
                f"{program.timestep_argument!r} outside of torch (float(), math.log(), a "
                "look-up): every step would need its own graph. Pass it as a tensor, and let the "
                "model compute with torch (torch.log), or do so in a block or a layer"
            )


def refuse_rewritten_arguments(recording: Recording) -> None:
    """Refuse a module that puts a value into a container among its arguments."""
    rewriting = next((call.name for call in recording.calls if call.rewrites), None)
    if rewriting is not None:
        raise CaptureError(
            f"module {rewriting!r} puts a value into a container (a dict, list or object) among "
            f"its arguments: {_APART}"
        )


def refuse_written_memory(
    model: nn.Module, call: FlatCall, tensors: Sequence[torch.Tensor], recording: Recording
) -> None:
    """Refuse a module that keeps a value in memory that outlives the call."""
    if not any(made.writes for made in recording.calls):
        return
    lasting = {storage_key(t): f"the model's {name!r}" for name, t in owned_tensors(model)}
    lasting.update(
        (storage_key(t), f"the argument {name!r}")
        for t, name in zip(tensors, call.arguments_of(), strict=True)
    )
    for made in recording.calls:
        written = next((lasting[m] for m in made.writes if m in lasting), None)
        if written is not None:
            raise CaptureError(f"module {made.name!r} writes into {written} in place: {_APART}")


def refuse_late_guards(guards: Guards, trunk: set[str]) -> None:
    """Refuse control flow that depends on a cached block's result."""
    late = [n.target for n in guards.gm.graph.find_nodes(op="call_module") if n.target in trunk]
    if late:
        raise CaptureError(
            "the model's control flow depends on the result of a cached block "
            f"({str(late[-1]).removeprefix('model.')}): its value is not known before the block "
            "runs. Move the decision into a block, or exclude the list with blocks=[...]"
        )
