"""Capture a model's forward as a checked `Program`, with one recorded run of the model.

`record` runs the model once, `trace` makes a graph of its own code around the leaf modules,
`normal_form` turns that into a program, `mark_blocks` finds the trunk, and `check` compares program
and model on inputs that neither has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_cache_fx._torch import without_dispatch_modes
from dit_cache_fx.capture.attributes import attributes, restore
from dit_cache_fx.capture.blocks import mark_blocks
from dit_cache_fx.capture.captured import Captured, Subject, not_recorded, sharded_owners
from dit_cache_fx.capture.check import IllegalInputs, compare, refusable, refuse, second_inputs
from dit_cache_fx.capture.leaves import BlockList, leaf_modules
from dit_cache_fx.capture.normal_form import no_guards, normal_form
from dit_cache_fx.capture.record import record
from dit_cache_fx.capture.recording import Recording
from dit_cache_fx.capture.refusals import (
    refuse_late_guards,
    refuse_read_number,
    refuse_rewritten_arguments,
    refuse_written_memory,
    require_timestep,
)
from dit_cache_fx.capture.settings import Watch, put_back, refuse_made_values
from dit_cache_fx.capture.side_effects import (
    Arguments,
    left_behind,
    refuse_state,
    unnoticed,
)
from dit_cache_fx.capture.signal import mark_signal, parts_of
from dit_cache_fx.capture.signature import FlatCall, unflatten_call
from dit_cache_fx.capture.timestep import guessed_timestep
from dit_cache_fx.capture.trace import trace
from dit_cache_fx.capture.world import World
from dit_cache_fx.errors import CaptureError, DitCacheError
from dit_cache_fx.ranks import ANOTHER, every, together
from dit_cache_fx.values.pytree import constants
from dit_cache_fx.values.wrapped import is_distributed

log = logging.getLogger(__name__)


def capture(subject: Subject, call: FlatCall, timestep_argument: str | None) -> Captured:
    """Capture the model for calls like `call`; its blocks run once, for this call's own answer.

    `timestep_argument`: None to find it; the program contains the result. Raises `DiscoveryError`
    if blocks or timestep cannot be determined, `CaptureError` if there is no graph or it differs
    from the model.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensors = [t.clone() if t.is_inference() else t for t in call.tensors]
        lists = subject.lists()
        leaves = leaf_modules(subject.model, lists)
        with together(subject.strategy.ranks):
            recording, unread = _recorded(subject, call, tensors, lists, leaves)
        put_back(recording.settings, recording.before)
        with unnoticed(subject.model), without_dispatch_modes():
            with together(subject.strategy.ranks):
                captured = _traced(
                    subject, call, tensors, lists, leaves, recording, timestep_argument
                )
            captured.unread = unread
            _ask_others(captured)
            if subject.check:
                with _explained("the captured graph fails, and the model does not"):
                    _check(subject, captured, call, tensors)
    return captured


def _ask_others(captured: Captured) -> None:
    """Let a process whose code reads no values agree with the others if theirs does."""
    ranks = captured.ranks
    if ranks is None or not ranks.own_calls or ranks.every(captured.guards is None):
        return
    captured.asked = ranks
    if captured.guards is None:
        captured.guards = no_guards(captured.program)
        captured.accepted.add(())


def _traced(
    subject: Subject,
    call: FlatCall,
    tensors: Sequence[torch.Tensor],
    lists: Sequence[BlockList],
    leaves: dict[nn.Module, str],
    recording: Recording,
    timestep_argument: str | None,
) -> Captured:
    """Trace a recorded call, and mark its blocks."""
    members = {m: leaves[m] for blocks in lists for m in blocks.modules}
    with _explained("the model's own code (outside its blocks and layers) cannot be traced"):
        traced = trace(lambda inputs: subject.run(call, inputs), tensors, leaves, recording)
    if timestep_argument is None:
        timestep_argument = guessed_timestep(call)
    require_timestep(call, timestep_argument)
    program, guards = normal_form(subject.model, traced, call, timestep_argument)
    refuse_read_number(call, program, guards)
    mark_blocks(program, lists, chosen=subject.blocks is not None)
    mark_signal(program, subject.strategy, recording)
    trunk = {str(node.target) for node in program.block_calls()}
    blocks = {m: name for m, name in members.items() if f"model.{name}" in trunk}
    # The graph depends on attributes that forward sets on a module, even if they have the value
    # already: then no module is looked up live without a check.
    whole = set() if recording.settings or subject.turns.needed else set(leaves)
    captured = Captured(program, program.gm, guards, recording, blocks, whole, set(), subject.turns)
    captured.not_recorded = not_recorded(program, recording)
    captured.opened, captured.ranks = sharded_owners(program), subject.strategy.ranks
    made = [layout for c in recording.calls for layout in c.layouts]
    captured.spread = any(made) or any(map(is_distributed, tensors))
    if guards is not None:
        refuse_late_guards(guards, trunk)
        captured.accepted.add(guards.shapes(guards.expected))
    return captured


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Explain errors as faults of the capture: the model itself has just answered this call."""
    try:
        yield
    except (DitCacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CaptureError(
            f"{what}: {type(error).__name__}: {error}. Move the failing code into a block or a "
            "layer, or compute its result before the call and pass it as an argument; or make "
            "such calls between disable() and enable()"
        ) from error


def _recorded(
    subject: Subject,
    call: FlatCall,
    tensors: Sequence[torch.Tensor],
    lists: Sequence[BlockList],
    leaves: dict[nn.Module, str],
) -> tuple[Recording, list[str]]:
    """Record the model; a layer that returns numbers is removed from `leaves` and traced.

    Also return the attributes that it sets and never reads, in words.
    """
    model = subject.model
    members = {m: leaves[m] for blocks in lists for m in blocks.modules}
    before = attributes(model.named_modules())
    theirs = {m for module in leaves for m in module.modules()}
    watch = Watch(leaves, World(model, theirs) if subject.check else None)
    arguments = Arguments(unflatten_call(call.skeleton, list(tensors)))
    try:
        recording = record(
            lambda: subject.answer(call, arguments.given),
            leaves,
            set(members),
            {m for m, name in members.items() if subject.always_runs(name)},
            {m: parts_of(m, leaves[m]) for m in subject.opened(lists)},
            watch,
        )
    except BaseException:  # forward takes back nothing of what it has set so far
        restore(model.named_modules(), before)
        raise
    numbers = {c.name for c in recording.calls if any(v is not None for v in constants(c.skeleton))}
    open_layers = [m for m, name in leaves.items() if name in numbers and m not in members]
    if open_layers:
        for module in open_layers:
            del leaves[module]
        restore(model.named_modules(), before)
        return _recorded(subject, call, tensors, lists, leaves)
    refuse_rewritten_arguments(recording)
    refuse_written_memory(model, call, tensors, recording)
    arguments.refuse_changed(recording.calls, notes=True)
    refuse_made_values(recording.settings, before)
    recording.before = {place: o for place, o in before.items() if o.module in theirs}
    if not subject.check:
        return recording, []
    left = left_behind(before, attributes(model.named_modules()), watch)
    noted, after = arguments.noted(), Arguments(arguments.given)
    again = partial(subject.answer, call, after.given)
    with without_dispatch_modes():
        unread = refuse_state(model, again, leaves, recording, left, noted)
    after.refuse_changed([], notes=False)
    return recording, unread


def _check(
    subject: Subject, captured: Captured, call: FlatCall, tensors: Sequence[torch.Tensor]
) -> None:
    program = captured.program
    position = program.timestep_position
    assert position is not None
    if call.number is not None:
        _check_number(subject, captured, call, tensors, position)
    sample = [i for i, a in enumerate(program.arguments) if a == program.sample]
    for inputs in second_inputs(tensors, position, sample):
        if not every(captured.ranks, _guards_hold(captured, inputs)):
            continue
        difference, refused = None, None
        try:
            difference = compare(
                refusable(partial(subject.run, call, inputs)),
                partial(captured.run, inputs),
                captured.blocks,
                captured.recording,
                sampled=captured.recording.suspect,
            )
        except IllegalInputs as error:
            refused = error.__cause__
            log.info("the model refuses inputs generated for a check: %r", refused)
        if not every(captured.ranks, refused is None):
            continue
        if not every(captured.ranks, difference is None):
            raise refuse(difference or ANOTHER)
        return


def _check_number(
    subject: Subject,
    captured: Captured,
    call: FlatCall,
    tensors: Sequence[torch.Tensor],
    timestep_position: int,
) -> None:
    """Check that the timestep acts the same as a tensor, which the graph takes, and as a number."""
    numbered: list[Any] = [*tensors]
    numbered[timestep_position] = call.number
    arguments = unflatten_call(call.skeleton, numbered)
    difference = compare(
        lambda: subject.answer(call, arguments),
        lambda: captured.run(tensors),
        captured.blocks,
        captured.recording,
    )
    if difference is not None:
        raise CaptureError(
            f"the model treats the timestep as a number differently from a tensor: {difference}. "
            "Pass it as a tensor"
        )


def _guards_hold(captured: Captured, inputs: Sequence[torch.Tensor]) -> bool:
    guards = captured.guards
    return guards is None or list(captured.read(inputs)) == list(guards.expected)
