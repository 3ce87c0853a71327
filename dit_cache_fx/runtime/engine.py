"""The engine behind a cached model: finds the graph, the step and the branch of each call."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_cache_fx._torch import sizes_are_captured
from dit_cache_fx.capture import FlatCall, Subject, can_replay, flatten_call, replayed
from dit_cache_fx.capture.ambient import autocast
from dit_cache_fx.capture.rerun import rerunning
from dit_cache_fx.capture.samples import other_block
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ranks import every
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.batch.batch_engine import BatchEngine
from dit_cache_fx.runtime.batch.row_steps import RowSteps
from dit_cache_fx.runtime.call_log import CallLog, CallStart
from dit_cache_fx.runtime.drive import Compiler, Results, Serving, drive
from dit_cache_fx.runtime.entry import Entry, GraphKey, RowsOf
from dit_cache_fx.runtime.graphs import Found, Graphs
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.step_compiler import StepCompiler
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.matching import CallEvidence
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.timestep_value import as_number
from dit_cache_fx.values.pytree import flatten, unflatten
from dit_cache_fx.values.wrapped import own_part

log = logging.getLogger(__name__)


_SIZED = (
    "the cached model has a size that depends on data (a selection by a mask), and is part of "
    "another compiled function, which cannot be one graph with it: pass fullgraph=True to "
    "torch.compile, or compile the cached model by itself"
)


class First(NamedTuple):
    """The answer of a new graph to the call of its capture."""

    step: Step | RowSteps
    results: Results


class Engine:
    """Answers the calls of one cached model."""

    def __init__(self, subject: Subject, timestep_argument: str | None) -> None:
        self.subject = subject
        self.call_log = CallLog(subject.strategy)
        self.batches = BatchEngine(self)
        self.graphs = Graphs(subject, timestep_argument, self.call_log.count)
        #: compiles the graphs under no other compiler; None: they run as they are
        self.step_compiler: StepCompiler | None = None

    # --- life cycle --------------------------------------------------------------------------

    def clear_states(self) -> None:
        """Forget the cached tensors and the place in the generation; keep the graphs."""
        self.call_log.tracker.clear()
        self.graphs.forget_carried()

    def reset_states(self) -> None:
        """Forget everything, including graphs and counts."""
        self.clear_states()
        self.call_log.count.forget()
        self.graphs.clear()
        self.batches.forget()
        self.call_log.forget_calls()

    # --- a call ------------------------------------------------------------------------------

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler) -> Serving:
        """Answer a call. `compiler`: runs the graphs that it yields.

        Records nothing of the call if it raises.
        """
        session = self.call_log.tracker.caller
        if isinstance(session, Batch):
            return (yield from self.batches.serve(session, args, kwargs, compiler))
        call = self._flat(args, kwargs)
        (key,) = self.graphs.keys([call])
        found = self.find(call, key)
        entry, first = found.entry, found.first
        with session.lock:
            start = self.begin(session, call, found)
            step = start.step
            stale = first is None and self._stale(entry, step)
            if not stale:
                by_schedule = step.computes
                output = yield from self._run(entry, step, call, first, compiler)
                # a rule decides within the step: only now it is known whether the step has computed
                stale = not by_schedule and first is None and self._stale(entry, step)
            if not stale:
                self.done(start, found)
                return output
        self.outdated(entry)
        return (yield from self.serve(args, kwargs, compiler))

    def find(self, call: FlatCall, key: GraphKey, rows: RowsOf | None = None) -> Found[First]:
        """Return the graph for a call; capture it if there is none. `rows`: those of the graph."""
        return self.graphs.find(call, key, partial(self._first, call), rows)

    def begin(self, session: Session, call: FlatCall, found: Found[First]) -> CallStart:
        """Find the place of a call in its session; nothing is recorded."""
        evidence = self._evidence(call, found.entry.key, found.entry, session)
        return self.call_log.begin(session, evidence, found.entry, found.shapes)

    def outdated(self, entry: Entry) -> None:
        """Forget everything: the model has changed since a graph was captured."""
        if self.graphs.outdated(entry):  # otherwise another thread did so
            log.info("capturing again")
            self.call_log.tracker.forget()

    def passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call that the model itself answers: it is a step of its generation."""
        session = self.call_log.tracker.caller
        if isinstance(session, Batch):
            self.batches.passed(session, args, kwargs)
        else:
            self.passed_in(session, self._flat(args, kwargs))

    def passed_in(self, session: Session, call: FlatCall) -> None:
        """Record such a call of this session."""
        (key,) = self.graphs.keys([call])
        entry = self.graphs.known(*key[0])
        if entry is not None:
            with session.lock:
                self.call_log.passed(session, self._evidence(call, key, entry, session))

    def _evidence(
        self, call: FlatCall, key: Hashable, entry: Entry, session: Session
    ) -> CallEvidence:
        """Collect the evidence for the branch of a call. Waits for a timestep on the device."""
        explicit, tensors = session.explicit, call.tensors
        position = entry.program.timestep_position
        assert position is not None
        read = self.call_log.read(tensors[position]) if explicit is None else float(explicit)
        hooked = entry.hooks.now()
        found = (key, session.forward_passes.of(read, hooked))
        return self.call_log.evidence(session, entry, found, read, tensors, hooked=hooked)

    def done(self, start: CallStart, found: Found[First]) -> None:
        """Record a call that has succeeded."""
        entry = found.entry
        if len(entry.served) < 2:
            entry.served.add(as_number(start.placement.call.value))
        arguments = entry.program.arguments
        captured = None if found.first is None else found.because
        self.call_log.done(start, lambda: [arguments[i] for i in entry.conditioning], captured)

    def _stale(self, entry: Entry, step: Step) -> bool:
        """Return whether the model has changed since a computed step's graph was captured."""
        return step.computes and self.graphs.stale(entry)

    def captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, FlatCall]:
        """Return the graph for a call like this; capture and check it if there is none."""
        call = self._flat(args, kwargs)
        (key,) = self.graphs.keys([call])
        return self.find(call, key).entry, call

    def carried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call inside another graph under construction, where there is no host.

        Buffers carry the state; the graph determines the step from the timestep.
        """
        if self.call_log.tracker.scope.splits:
            raise CaptureError(
                "a batch of sessions cannot be part of another compiled function or of an exported "
                "program: compile the cached model by itself"
            )
        call = self._flat(args, kwargs)
        entry = self.graphs.known(call.key)
        if entry is not None and (autocast() or entry.captured.recording.settings):
            raise CaptureError(
                "inside torch.export, or inside another compiled function, a cached model "
                "supports neither autocast nor attributes that the model's forward sets on its "
                "blocks (a LoRA strength, for example). Use dit_cache_fx.export"
            )
        if entry is None:
            raise CaptureError(
                "inside torch.export, or inside another compiled function, tensors have no values, "
                "and no graph was captured for a call like this: call the cached model once with "
                "these arguments before"
            )
        under_dynamo = torch.compiler.is_dynamo_compiling()
        if under_dynamo and entry.sized_by_data() and not sizes_are_captured():
            raise CaptureError(_SIZED)
        outputs = entry.carried_in(self.call_log.tracker.context)(entry.inputs(call))
        return unflatten(entry.program.output, outputs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        arguments = self.subject.signature.bind(args, kwargs)
        self.graphs.learn_timestep(arguments)
        return arguments

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        return flatten_call(self.arguments(args, kwargs), self.graphs.timestep_argument)

    def _run(
        self, entry: Entry, step: Step, call: FlatCall, first: First | None, compiler: Compiler
    ) -> Serving:
        step_compiler = self.step_compiler
        if compiler.looks_on:
            results = yield from execution.watched(entry, step, call, compiler)
        elif step_compiler is not None:
            compiled_variants = step_compiler.compiled(entry.variants)
            results = yield from execution.compiled_steps(entry, step, call, compiled_variants)
        elif first is not None:
            assert isinstance(first.step, Step)
            step.follow(first.step)
            results = first.results
        else:
            results = yield from execution.plain(entry, step, call)
        outputs, recorded = results[: entry.variants.outputs], results[entry.variants.outputs :]
        owned = step.commit(call.tensors, outputs, recorded)
        return unflatten(entry.program.output, owned)

    def _first(self, call: FlatCall, entry: Entry) -> First:
        """Run a new graph for the call of its capture, and check the result.

        Its blocks return the results of the recorded run. They run again if they may depend on more
        than their arguments.
        """
        captured, step = entry.captured, self._new_step(entry)
        recording, check = captured.recording, self.subject.check
        try:
            if check and recording.suspect:
                results = self._compared(entry, step, call)
            else:
                with replayed(captured) if can_replay(captured) else nullcontext():
                    results = _plain(entry, step, call)
            if check and not every(captured.ranks, _gives(recording.output, results)):
                raise CaptureError(
                    "the captured graph does not give the model's output for the call that it "
                    "was captured from: a layer around the blocks is random or keeps a state. "
                    "Pass check=False if that is intended"
                )
        finally:
            recording.forget()
        return First(step, results)

    def _compared(self, entry: Entry, step: Step | RowSteps, call: FlatCall) -> Results:
        """Return the graph's results when its blocks return those of the model."""
        model, captured = self.subject.model, entry.captured
        with rerunning(model, captured) as rerun:
            results = _plain(entry, step, call)
        block = rerun.differing()
        if block is None:
            return results
        with rerunning(model, captured) as another:
            _plain(entry, self._new_step(entry), call)
        if another.repeats(rerun):
            raise other_block(block)
        log.info("block %s gives another result each time", block)
        return flatten(captured.recording.output)[0] + list(results[entry.variants.outputs :])

    def _new_step(self, entry: Entry) -> Step | RowSteps:
        """Return the first step of a branch that holds nothing, or of several of them."""
        layout, strategy = entry.layout, entry.strategy
        if layout is None:
            return Step(strategy, Branch(), 0, entry.variants.cached)
        steps = [Step(strategy, Branch(), 0, layout.alone) for _ in range(layout.count)]
        return RowSteps(steps, layout)


def _plain(entry: Entry, step: Step | RowSteps, call: FlatCall) -> Results:
    with torch.no_grad():
        results: Results = drive(execution.plain(entry, step, call))
    return results


def _gives(output: Any, results: Results) -> bool:
    """Return whether the results of a graph are those of the model."""
    return all(map(_same, flatten(output)[0], results))


def _same(want: torch.Tensor, got: torch.Tensor) -> bool:
    return torch.equal(own_part(want).nan_to_num(), own_part(got).nan_to_num())


def requires_grad(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return whether autograd is on and some tensor here requires gradients."""
    if not torch.is_grad_enabled():
        return False
    if any(p.requires_grad for p in model.parameters()):
        return True
    return any(t.requires_grad for t in flatten((args, kwargs))[0])
