"""Everything behind a cached model: finds the graph, the step and the branch of each call."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_cache_fx.capture import FlatCall, Subject, can_replay, flatten_call, replayed
from dit_cache_fx.capture.ambient import autocast
from dit_cache_fx.capture.rerun import rerunning
from dit_cache_fx.capture.samples import other_block
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ranks import every
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.batch_engine import BatchEngine
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.call_log import CallLog, CallStart
from dit_cache_fx.runtime.drive import Compiler, Results, Serving, drive
from dit_cache_fx.runtime.execution import StepCompiler
from dit_cache_fx.runtime.graphs import Entry, Found, GraphKey, Graphs, RowsOf, input_key
from dit_cache_fx.runtime.matching import CallEvidence
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.timestep_value import as_number
from dit_cache_fx.runtime.together import Together
from dit_cache_fx.values.pytree import flatten, unflatten
from dit_cache_fx.values.wrapped import own_part

log = logging.getLogger(__name__)


class First(NamedTuple):
    """The answer of a new graph to the call that it was captured from."""

    step: Step | Together
    results: Results


class Engine:
    """Answers the calls of one cached model."""

    def __init__(self, subject: Subject, timestep_argument: str | None) -> None:
        self.subject = subject
        self.call_log = CallLog(subject.strategy)
        self.batches = BatchEngine(self)
        self.graphs = Graphs(subject, timestep_argument, self.call_log.count)
        #: compiles the graphs where nothing else does; None: they run as they are
        self.step_compiler: StepCompiler | None = None

    # --- life cycle --------------------------------------------------------------------------

    def clear_states(self) -> None:
        """Forget what is held and where the generation stands; keep the graphs."""
        self.call_log.tracker.clear()
        self.graphs.forget_carried()

    def reset_states(self) -> None:
        """Forget everything, graphs and counts included."""
        self.clear_states()
        self.call_log.count.forget()
        self.graphs.clear()
        self.batches.forget()
        self.call_log.forget_calls()

    # --- a call ------------------------------------------------------------------------------

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler) -> Serving:
        """Answer a call. `compiler`: what the graphs that are asked for go through.

        Nothing of the call is noted when it raises.
        """
        batch = self.call_log.tracker.batch
        if batch is not None:
            return (yield from self.batches.serve(batch, args, kwargs, compiler))
        call = self._flat(args, kwargs)
        key = input_key(call)
        found = self.find(call, key)
        entry, first = found.entry, found.first
        session = self.call_log.tracker.session
        with session.lock:
            start = self.begin(session, call, found)
            step = start.step
            stale = first is None and self._stale(entry, step)
            if not stale:
                by_schedule = step.computes
                output = yield from self._run(entry, step, call, first, compiler)
                # where the strategy's rule decides, it is known now that the step has computed
                stale = not by_schedule and first is None and self._stale(entry, step)
            if not stale:
                self.done(start, found)
                return output
        self.outdated(entry)
        return (yield from self.serve(args, kwargs, compiler))

    def find(self, call: FlatCall, key: GraphKey, rows: RowsOf | None = None) -> Found[First]:
        """The graph for a call, captured where there is none. `rows`: what it has rows of."""
        return self.graphs.find(call, key, partial(self._first, call), rows)

    def begin(self, session: Session, call: FlatCall, found: Found[First]) -> CallStart:
        """Find the place of a call in its session; nothing is noted."""
        evidence = self._evidence(call, found.entry.key, found.entry, session)
        return self.call_log.begin(session, evidence, found.entry, found.shapes)

    def outdated(self, entry: Entry) -> None:
        """The model has changed since a graph was captured: forget all."""
        if self.graphs.outdated(entry):  # else another thread has seen it
            log.info("capturing again")
            self.call_log.tracker.forget()

    def passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call that the model itself answers: it is a step of its generation."""
        batch = self.call_log.tracker.batch
        if batch is not None:
            self.batches.passed(batch, args, kwargs)
        else:
            self.passed_in(self.call_log.tracker.session, self._flat(args, kwargs))

    def passed_in(self, session: Session, call: FlatCall) -> None:
        """The same for a call of this session."""
        entry = self.graphs.known(call.key)
        if entry is not None:
            with session.lock:
                self.call_log.passed(session, self._evidence(call, input_key(call), entry, session))

    def _evidence(
        self, call: FlatCall, key: Hashable, entry: Entry, session: Session
    ) -> CallEvidence:
        """What tells where a call belongs. Waits for the device where the timestep is on one."""
        explicit, tensors = session.explicit, call.tensors
        position = entry.program.timestep_position
        assert position is not None
        read = self.call_log.read(tensors[position]) if explicit is None else float(explicit)
        hooked = entry.hooks.now()
        found = (key, session.passes.of(read, hooked))
        return self.call_log.evidence(session, entry, found, read, tensors, hooked=hooked)

    def done(self, start: CallStart, found: Found[First]) -> None:
        """Note a call that has succeeded."""
        entry = found.entry
        if len(entry.served) < 2:
            entry.served.add(as_number(start.placement.call.value))
        arguments = entry.program.arguments
        captured = None if found.first is None else found.because
        self.call_log.done(start, lambda: [arguments[i] for i in entry.conditioning], captured)

    def _stale(self, entry: Entry, step: Step) -> bool:
        """Whether a computed step's graph is of a model that has changed since."""
        return step.computes and self.graphs.stale(entry)

    def captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, FlatCall]:
        """The graph for a call like this, captured and checked where there is none."""
        call = self._flat(args, kwargs)
        return self.find(call, input_key(call)).entry, call

    def carried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call from inside another graph that is being made, where there is no host.

        The state is carried in buffers; the step is told from the timestep in the graph.
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
                "inside torch.export, or inside another compiled function, neither autocast nor "
                "attributes that the model's forward sets on its blocks (a strength of LoRA, say) "
                "can be part of a cached model. Use dit_cache_fx.export"
            )
        if entry is None:
            raise CaptureError(
                "inside torch.export, or inside another compiled function, tensors have no values, "
                "and no graph was captured for a call like this: call the cached model once with "
                "these arguments before"
            )
        outputs = entry.carried_in(self.call_log.tracker.context)(entry.inputs(call))
        return unflatten(entry.program.output, outputs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
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
        """Run a new graph for the call that it was captured from, and check what it gives.

        Its blocks answer as they did in the recorded run. Where they may depend on more than their
        arguments they run again.
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
                    "the captured graph does not give the model's output for the call that it was "
                    "captured from: a layer around the blocks is random or keeps a state. Pass "
                    "check=False if that is wanted"
                )
        finally:
            recording.forget()
        return First(step, results)

    def _compared(self, entry: Entry, step: Step | Together, call: FlatCall) -> Results:
        """The graph's answer, whose blocks give what they gave in the model."""
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
        log.info("block %s gives something else each time", block)
        return flatten(captured.recording.output)[0] + list(results[entry.variants.outputs :])

    def _new_step(self, entry: Entry) -> Step | Together:
        """The first step of a branch that holds nothing, or of several of them."""
        layout, strategy = entry.layout, entry.strategy
        if layout is None:
            return Step(strategy, Branch(), 0, entry.variants.held)
        steps = [Step(strategy, Branch(), 0, layout.alone) for _ in range(layout.count)]
        return Together(steps, layout)


def _plain(entry: Entry, step: Step | Together, call: FlatCall) -> Results:
    with torch.no_grad():
        results: Results = drive(execution.plain(entry, step, call))
    return results


def _gives(output: Any, results: Results) -> bool:
    """Whether the results of a graph are those of the model."""
    return all(map(_same, flatten(output)[0], results))


def _same(want: torch.Tensor, got: torch.Tensor) -> bool:
    return torch.equal(own_part(want).nan_to_num(), own_part(got).nan_to_num())


def requires_grad(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether autograd is on and something here takes part in it."""
    if not torch.is_grad_enabled():
        return False
    if any(p.requires_grad for p in model.parameters()):
        return True
    return any(t.requires_grad for t in flatten((args, kwargs))[0])
