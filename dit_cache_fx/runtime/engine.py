"""Everything behind a cached model: finds the graph, the step and the branch of each call."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dit_cache_fx.capture import FlatCall, Subject, can_replay, flatten_call, replayed
from dit_cache_fx.capture.ambient import autocast
from dit_cache_fx.capture.rerun import rerunning
from dit_cache_fx.capture.samples import other_block
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.call_log import Host
from dit_cache_fx.runtime.drive import Compiler, Results, Serving, drive_here
from dit_cache_fx.runtime.execution import StepCompiler
from dit_cache_fx.runtime.generation import timestep_value
from dit_cache_fx.runtime.graphs import Entry, Graphs, input_key
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.values.identity import Seen
from dit_cache_fx.values.pytree import flatten, unflatten

log = logging.getLogger(__name__)


class Engine:
    """Answers the calls of one cached model."""

    def __init__(self, subject: Subject, timestep: str | None) -> None:
        self.subject = subject
        self.host = Host(subject.strategy)
        self.graphs = Graphs(subject, timestep, self.host.count)
        #: compiles the graphs where nothing else does; None: they run as they are
        self.step_compiler: StepCompiler | None = None

    # --- life cycle --------------------------------------------------------------------------

    def clear_states(self) -> None:
        """Forget what is held and where the generation stands; keep the graphs."""
        self.host.tracker.clear()
        self.graphs.forget_carried()

    def reset_states(self) -> None:
        """Forget everything, graphs and counts included."""
        self.clear_states()
        self.host.count.counted = None
        self.graphs.clear()
        self.host.forget_calls()

    # --- a call ------------------------------------------------------------------------------

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler) -> Serving:
        """Answer a call. `compiler`: what the graphs that are asked for go through.

        Nothing of the call is noted when it raises.
        """
        call = self._flat(args, kwargs)
        key = input_key(call)
        entry, first = self.graphs.find(call, key)
        value = self._value(call, entry)
        session = self.host.tracker.session(key, entry.serial)
        with session.restored_on_error():
            conditioning = Seen([call.tensors[i] for i in entry.conditioning])
            held, shapes = entry.variants.held, entry.captured.shapes
            place = self.host.begin(session, value, conditioning, held, shapes)
            step = place.step
            stale = self._stale(entry, step, first)
            if not stale:
                by_schedule = step.computes
                output = yield from self._run(entry, step, call, first, compiler)
                # where the strategy's rule decides, it is known now that the step has computed
                stale = not by_schedule and self._stale(entry, step, first)
        if stale:
            log.info("capturing again")
            self.graphs.clear()
            self.host.tracker.forget()
            return (yield from self.serve(args, kwargs, compiler))
        if len(entry.served) < 2:
            entry.served.add(value)
        self.host.done(place, value)
        return output

    def _stale(self, entry: Entry, step: Step, first: bool) -> bool:
        """Whether a computed step's graph is of a model that has changed since."""
        return step.computes and not first and self.graphs.stale(entry)

    def captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, FlatCall]:
        """The graph for a call like this, captured and checked where there is none."""
        call = self._flat(args, kwargs)
        entry, first = self.graphs.find(call, input_key(call))
        if first:
            self._first(entry, Step(self.host.strategy, Branch(), 0, entry.variants.held), call)
        return entry, call

    def carried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call from inside another graph that is being made, where there is no host.

        The state is carried in buffers; the step is told from the timestep in the graph.
        """
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
        outputs = entry.carried_in(self.host.tracker.context)(entry.inputs(call))
        return unflatten(entry.program.output, outputs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        arguments = self.subject.signature.bind(args, kwargs)
        self.graphs.learn_timestep(tuple(arguments))
        return flatten_call(arguments, self.graphs.timestep)

    def _value(self, call: FlatCall, entry: Entry) -> float:
        if self.host.tracker.explicit is not None:
            return float(self.host.tracker.explicit)
        assert entry.timestep is not None
        return timestep_value(call.tensors[entry.timestep])

    def _run(
        self, entry: Entry, step: Step, call: FlatCall, first: bool, compiler: Compiler
    ) -> Serving:
        watched, separate = compiler is not Compiler.NONE, self.step_compiler
        if first:
            compiled = watched or separate is not None
            results = self._first(entry, step.anew() if compiled else step, call)
        if watched:
            results = yield from execution.watched(entry, step, call, compiler)
        elif separate is not None:
            compiled_variants = separate.compiled(entry.variants)
            results = yield from execution.separate(entry, step, call, compiled_variants)
        elif not first:
            results = yield from execution.plain(entry, step, call)
        outputs, kept = results[: entry.variants.outputs], results[entry.variants.outputs :]
        owned = step.commit(call.tensors, outputs, kept)
        return unflatten(entry.program.output, owned)

    def _first(self, entry: Entry, step: Step, call: FlatCall) -> Results:
        """Run a new graph for the call that it was captured from, and check what it gives.

        Its blocks answer as they did in the recorded run. Where they may depend on more than their
        arguments they run again.
        """
        captured = entry.captured
        recording, check = captured.recording, self.subject.check
        try:
            if check and recording.suspect:
                results = self._compared(entry, step, call)
            else:
                with replayed(captured) if can_replay(captured) else nullcontext():
                    results = self._plain(entry, step, call)
            if check and not all(map(_same, flatten(recording.output)[0], results)):
                raise CaptureError(
                    "the captured graph does not give the model's output for the call that it was "
                    "captured from: a layer around the blocks is random or keeps a state. Pass "
                    "check=False if that is wanted"
                )
        except CaptureError:
            self.graphs.clear()
            raise
        finally:
            recording.output, recording.before, recording.world = None, {}, None
            for made in recording.calls:
                made.values.clear()
                made.digests.clear()
        return results

    def _compared(self, entry: Entry, step: Step, call: FlatCall) -> Results:
        """The graph's answer, whose blocks give what they gave in the model."""
        model, captured = self.subject.model, entry.captured
        with rerunning(model, captured) as rerun:
            results = self._plain(entry, step, call)
        block = rerun.differing()
        if block is None:
            return results
        with rerunning(model, captured) as another:
            self._plain(entry, step.anew(), call)
        if another.repeats(rerun):
            raise other_block(block)
        log.info("block %s gives something else each time", block)
        return flatten(captured.recording.output)[0] + list(results[entry.variants.outputs :])

    def _plain(self, entry: Entry, step: Step, call: FlatCall) -> Results:
        with torch.no_grad():
            results: Results = drive_here(execution.plain(entry, step, call))
        return results


def _same(want: torch.Tensor, got: torch.Tensor) -> bool:
    return torch.equal(want.nan_to_num(), got.nan_to_num())


def requires_grad(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether autograd is on and something here takes part in it."""
    if not torch.is_grad_enabled():
        return False
    if any(p.requires_grad for p in model.parameters()):
        return True
    return any(t.requires_grad for t in flatten((args, kwargs))[0])
