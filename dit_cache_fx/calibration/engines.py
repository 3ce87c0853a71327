"""Let a cached model answer with another strategy for a while, from the same captures.

Candidates differ in the tensors that they store and in the steps that they compute, not in their
capture. So one capture of each input signature serves all of them: its program is copied and
lowered once for each predictor, and a new schedule needs nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.calibration.probe import probe
from dit_cache_fx.capture import FlatCall
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.drive import Compiler, Serving
from dit_cache_fx.runtime.engine import Engine
from dit_cache_fx.runtime.entry import Entry, GraphKey, RowsOf
from dit_cache_fx.runtime.graphs import Found, Graphs
from dit_cache_fx.runtime.tracking.generation import Generation
from dit_cache_fx.strategies import Strategy, spread_over
from dit_cache_fx.values.pytree import flatten

_T = TypeVar("_T")


@contextmanager
def answering(cached: CachedModel, engine: Engine | None) -> Iterator[None]:
    """Redirect the calls of a cached model to another engine; None: to the model itself.

    Its own cached tensors and generation do not change.
    """
    before = cached._engine, cached._enabled
    cached._engine, cached._enabled = engine or cached._engine, engine is not None
    try:
        with torch.no_grad():
            yield
    finally:
        cached._engine, cached._enabled = before


class Call(NamedTuple):
    """An answered call: its generation and step, its sample and its output."""

    generation: Generation
    step: int
    timestep: float
    sample: torch.Tensor | None
    output: torch.Tensor | None


class RecordingEngine(Engine):
    """Answers according to its strategy, and passes every call to `listener`."""

    def __init__(self, like: Engine, strategy: Strategy, listener: Callable[[Call], None]) -> None:
        super().__init__(replace(like.subject, strategy=strategy), like.graphs.timestep_argument)
        self.graphs.keep_programs = True
        self.listener = listener
        self._newest: tuple[int, int] | None = None  # the newest call that was passed on

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler) -> Serving:
        session, call = self.call_log.tracker.session, self._flat(args, kwargs)
        output = yield from super().serve(args, kwargs, compiler)
        this = (id(session), session.calls)
        if this != self._newest and session.newest is not None:
            self._newest = this
            position, sample = session.newest.position, _sample(self.graphs, call)
            found = [t for t in flatten(output)[0] if t.is_floating_point()]
            made = found[0] if found else None
            timestep = session.newest.number(position.value)
            self.listener(Call(session.newest, position.index, timestep, sample, made))
        return output


class CandidateEngine(Engine):
    """Answers with a predictor, from the captures of `origin`; `follow` sets the steps."""

    def __init__(self, origin: Engine, predictor: Strategy) -> None:
        subject = replace(origin.subject, strategy=predictor)
        super().__init__(subject, origin.graphs.timestep_argument)
        self.graphs = _Relowered(origin, self.graphs)
        self._called = False
        self.start: torch.Tensor | None = None  # elements of the first call's sample

    def follow(self, strategy: Strategy) -> None:
        """Start again with a strategy that has the same predictor."""
        self.call_log, self._called, self.start = CallLog(strategy), False, None

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: Compiler) -> Serving:
        output = yield from super().serve(args, kwargs, compiler)
        if not self._called:
            sample = _sample(self.graphs, self._flat(args, kwargs))
            self._called, self.start = True, None if sample is None else probe(sample)
        return output


def _sample(graphs: Graphs, call: FlatCall) -> torch.Tensor | None:
    """Return the noisy sample of an answered call."""
    entry = graphs.known(call.key)
    return None if entry is None or entry.sample is None else call.tensors[entry.sample]


class _Relowered(Graphs):
    """The graphs of `origin`, lowered for another strategy."""

    def __init__(self, origin: Engine, own: Graphs) -> None:
        super().__init__(own.subject, own.timestep_argument, own.count)
        self._origin = origin
        self.numbers = origin.graphs.numbers

    def _captured(
        self,
        call: FlatCall,
        key: GraphKey,
        check: Callable[[Entry], _T],
        rows: RowsOf | None,
    ) -> Found[_T]:
        if rows is not None:  # a batch's graph depends on each row's state
            return super()._captured(call, key, check, rows)
        known = self._origin.graphs.find(call, key, partial(self._origin._first, call))
        self.timestep_argument = self._origin.graphs.timestep_argument
        strategy = spread_over(self.subject.strategy, known.entry.strategy.ranks)
        entry = known.entry.lowered_for(strategy, self.count)
        self.keep(key, entry)
        return Found(entry, known.shapes, None)

    def outdated(self, entry: Entry) -> bool:
        self._origin.graphs.clear()
        return super().outdated(entry)
