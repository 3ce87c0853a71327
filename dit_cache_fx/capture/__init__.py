"""From a model's forward to a checked `Program`, in one recorded run of the model.

`record` runs the model once, `trace` makes the graph of what it does around its kept modules,
`normal_form` makes that a program, `mark_blocks` finds the trunk and `check` compares program and
model on inputs that neither has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx.capture.blocks import mark_blocks
from dit_cache_fx.capture.check import compare, refuse, second_inputs
from dit_cache_fx.capture.intercept import CAPTURING, intercepted
from dit_cache_fx.capture.leaves import (
    BlockList,
    candidate_lists,
    kept_modules,
    named_list,
)
from dit_cache_fx.capture.normal_form import Guards, normal_form
from dit_cache_fx.capture.record import ModuleCall, Recording, record
from dit_cache_fx.capture.signal import MARKS, mark_modulated, parts_of
from dit_cache_fx.capture.signature import CallSignature, FlatCall, flatten_call, unflatten_call
from dit_cache_fx.capture.timestep import guessed_timestep, named_timestep
from dit_cache_fx.capture.trace import trace
from dit_cache_fx.errors import CaptureError, DiscoveryError
from dit_cache_fx.identity import Seen
from dit_cache_fx.program import OUTPUT, BlockId, Program, block_values
from dit_cache_fx.strategies import Strategy, never_cached
from dit_cache_fx.structure import constants, unflatten

__all__ = [
    "CAPTURING",
    "BlockList",
    "CallSignature",
    "Captured",
    "FlatCall",
    "Subject",
    "accepts",
    "can_replay",
    "candidate_lists",
    "capture",
    "flatten_call",
    "named_list",
    "named_timestep",
    "replayed",
]

log = logging.getLogger(__name__)


@dataclass
class Captured:
    """A program that was checked, with what is needed to trust it on the next call."""

    program: Program
    gm: fx.GraphModule  # the graph as captured; the passes give the program others
    guards: Guards | None
    recording: Recording  # of the call that it was captured from, until that call is answered
    blocks: dict[nn.Module, str]
    whole: set[nn.Module]  # every module that the graph calls as a node
    accepted: set[tuple[torch.Size, ...]]  # guard shapes that the graph was checked with
    not_held: frozenset[str] = frozenset()  # block results that the recording did not hold
    shapes: tuple[torch.Size, ...] = ()  # guard shapes of the newest call
    seen: Seen | None = None  # the newest call's tensors that the guards depend on


@dataclass(frozen=True)
class Subject:
    """What is captured: the model, how it is called, and where its blocks are looked for."""

    model: nn.Module
    signature: CallSignature
    blocks: tuple[str, ...] | None  # the block lists' names where the user gave them
    strategy: Strategy
    check: bool = True

    def lists(self) -> list[BlockList]:
        """The lists that may hold the trunk, as they are now."""
        if self.blocks is None:
            return candidate_lists(self.model)
        return [named_list(self.model, name) for name in self.blocks]

    def always_runs(self, name: str) -> bool:
        """Whether the block of this name may be one that is never cached.

        Before the trunk is found an alias ("double_blocks") can mean any of the lists.
        """
        list_name, _, index = name.rpartition(".")
        block = BlockId(list_name, int(index))
        return any(
            never_cached(block, self.strategy, lists) for lists in ((list_name,), ("", list_name))
        )

    def opened(self, lists: Sequence[BlockList]) -> list[nn.Module]:
        """The blocks whose inside is recorded, to find the strategy's signal there."""
        wanted = self.strategy.has_rule and self.strategy.looks_at() == "modulated"
        return [blocks.modules[0] for blocks in lists] if wanted else []

    def run(self, call: FlatCall, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's own answer to a flattened call with these tensors."""
        arguments = unflatten_call(call.skeleton, list(tensors))
        return self.signature.call(self.model.forward, arguments)


def capture(subject: Subject, call: FlatCall, timestep: str | None) -> Captured:
    """Capture the model for calls like `call`; its blocks run once, for this call's own answer.

    Raises `DiscoveryError` where blocks or timestep cannot be told, `CaptureError` where the graph
    cannot be made or differs from the model.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensors = [t.clone() if t.is_inference() else t for t in call.tensors]
        lists = subject.lists()
        kept = kept_modules(subject.model, lists)
        members = {m: kept[m] for blocks in lists for m in blocks.modules}
        recording = _recorded(subject, call, tensors, lists, kept)
        _refuse_rewritten_arguments(recording)
        traced = trace(lambda inputs: subject.run(call, inputs), tensors, kept, recording)
        step = timestep if timestep is not None else guessed_timestep(call)
        _require_timestep(call, step)
        program, guards = normal_form(subject.model, traced, call, step)
        mark_blocks(program, lists, chosen=subject.blocks is not None)
        _mark_signal(program, subject.strategy, recording)
        trunk = {str(node.target) for node in program.block_calls()}
        blocks = {m: name for m, name in members.items() if f"model.{name}" in trunk}
        captured = Captured(program, program.gm, guards, recording, blocks, set(kept), set())
        captured.not_held = _not_held(program, recording)
        if guards is not None:
            _refuse_late_guards(guards, trunk)
            captured.shapes = guards.shapes(guards.expected)
            captured.accepted.add(captured.shapes)
        if subject.check:
            _check(subject, captured, call, tensors)
    log.info("captured %d blocks in %s", len(blocks), dict(program.block_lists))
    return captured


def _recorded(
    subject: Subject,
    call: FlatCall,
    tensors: Sequence[torch.Tensor],
    lists: Sequence[BlockList],
    kept: dict[nn.Module, str],
) -> Recording:
    """Record the model; a layer that answers with numbers is looked into, so leaves `kept`."""
    members = {m: kept[m] for blocks in lists for m in blocks.modules}
    recording = record(
        lambda: subject.run(call, tensors),
        kept,
        set(members),
        {m for m, name in members.items() if subject.always_runs(name)},
        {m: parts_of(m, kept[m]) for m in subject.opened(lists)},
    )
    numbers = {c.name for c in recording.calls if any(v is not None for v in constants(c.skeleton))}
    open_layers = [m for m, name in kept.items() if name in numbers and m not in members]
    if not open_layers:
        return recording
    for module in open_layers:
        del kept[module]
    return _recorded(subject, call, tensors, lists, kept)


def accepts(subject: Subject, captured: Captured, call: FlatCall) -> bool:
    """Whether the captured graph is right for this call (whose signature is the capture's).

    Where a masked selection has another size than any seen, the graph is checked with it first.
    """
    guards = captured.guards
    if guards is None:
        return True
    tensors = Seen([call.tensors[i] for i in guards.inputs], certain=True)
    if captured.seen is not None and tensors.shared_with(captured.seen) == len(guards.inputs):
        return True
    with torch.no_grad():
        read = guards.gm(*call.tensors)
    if guards.values(read) != guards.values(guards.expected):
        log.info("guards: read %s, captured %s", read, guards.expected)
        return False
    shapes = guards.shapes(read)
    if shapes not in captured.accepted:
        if _compare(subject, captured, call, call.tensors) is not None:
            return False
        captured.accepted.add(shapes)
    captured.shapes, captured.seen = shapes, tensors
    return True


def can_replay(captured: Captured) -> bool:
    """Whether the recording holds all that is read of blocks: run values, never cached blocks."""
    program = captured.program
    read = {name for region in program.regions for name in region.values}
    read |= {value.name for call in program.block_calls() for value in block_values(call)}
    return not read & captured.not_held


def _not_held(program: Program, recording: Recording) -> frozenset[str]:
    calls: dict[str, Iterator[ModuleCall]] = {}
    missing: list[str] = []
    for node in program.block_calls():
        name = str(node.target).removeprefix("model.")
        if name not in calls:
            calls[name] = iter([c for c in recording.calls if c.name == name])
        made = next(calls[name])
        missing += [v.name for v in block_values(node) if v.meta[OUTPUT] not in made.values]
    return frozenset(missing)


@contextmanager
def replayed(captured: Captured) -> Iterator[None]:
    """Within the context the blocks return what they returned in the recorded run."""
    calls: dict[str, Iterator[ModuleCall]] = {
        name: iter([c for c in captured.recording.calls if c.name == name])
        for name in captured.blocks.values()
    }

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        made = next(calls[name])
        return unflatten(made.skeleton, made.outputs())

    with intercepted(captured.blocks, handle):
        yield


def _require_timestep(call: FlatCall, timestep: str) -> None:
    if call.arguments_of().count(timestep) != 1:
        raise DiscoveryError(
            f"the timestep argument {timestep!r} must be one tensor or number; in this call it is "
            "not. Name another one: timestep='...'"
        )


def _mark_signal(program: Program, strategy: Strategy, recording: Recording) -> None:
    """Find what the strategy's own rule looks at, where it has one."""
    if not strategy.has_rule:
        return
    mark = MARKS.get(strategy.looks_at())
    if mark is not None:
        mark(program, strategy.stream_name())
        return
    name = str(program.block_calls()[0].target).removeprefix("model.")
    made = next(c for c in recording.calls if c.name == name)
    mark_modulated(program, made, strategy.stream_name())
    for call in recording.calls:
        call.inside = None


def _refuse_rewritten_arguments(recording: Recording) -> None:
    rewriting = next((call.name for call in recording.calls if call.rewrites), None)
    if rewriting is not None:
        raise CaptureError(
            f"module {rewriting!r} puts a value into a container (a dict, list or object) among "
            "its arguments: a cached step could not do the same. Let the module return the value "
            "instead"
        )


def _refuse_late_guards(guards: Guards, trunk: set[str]) -> None:
    late = [n.target for n in guards.gm.graph.nodes if n.op == "call_module" and n.target in trunk]
    if late:
        raise CaptureError(
            "the model's control flow depends on the result of a cached block "
            f"({str(late[-1]).removeprefix('model.')}): its value is not known before the block "
            "runs. Move the decision into a block, or exclude the list with blocks=[...]"
        )


def _check(
    subject: Subject, captured: Captured, call: FlatCall, tensors: Sequence[torch.Tensor]
) -> None:
    program = captured.program
    step = program.inputs.index(str(program.timestep))
    if call.number is not None:
        _check_number(subject, captured, call, tensors, step)
    sample = [i for i, a in enumerate(program.arguments) if a == program.sample]
    for inputs in second_inputs(tensors, step, sample):
        if _guards_hold(captured.guards, inputs):
            difference = _compare(subject, captured, call, inputs)
            if difference is not None:
                raise refuse(difference)
            return


def _check_number(
    subject: Subject,
    captured: Captured,
    call: FlatCall,
    tensors: Sequence[torch.Tensor],
    step: int,
) -> None:
    """The graph takes the timestep as a tensor: that must act as the number does."""
    numbered: list[Any] = [*tensors]
    numbered[step] = call.number
    arguments = unflatten_call(call.skeleton, numbered)
    difference = compare(
        lambda: subject.signature.call(subject.model.forward, arguments),
        lambda: captured.gm(*tensors),
        captured.blocks,
        captured.recording,
    )
    if difference is not None:
        raise CaptureError(
            f"the model treats the timestep as a number differently from a tensor: {difference}. "
            "Pass it as a tensor"
        )


def _guards_hold(guards: Guards | None, inputs: Sequence[torch.Tensor]) -> bool:
    return guards is None or list(guards.gm(*inputs)) == list(guards.expected)


def _compare(
    subject: Subject, captured: Captured, call: FlatCall, tensors: Sequence[torch.Tensor]
) -> str | None:
    return compare(
        lambda: subject.run(call, tensors),
        lambda: captured.gm(*tensors),
        captured.blocks,
        captured.recording,
    )
