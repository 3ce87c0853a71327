"""Graphs that are not cached, whose calls the cache records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dit_cache_fx._torch import Piece
from dit_cache_fx.dynamo.capture import Outlined
from dit_cache_fx.dynamo.shared import NO_BLOCKS, Compiled, Shared, step_value
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue
from dit_cache_fx.values.tensor_spec import TensorSpec


class NotingGraph:
    """A piece without blocks that gets the timestep: it passes the value to later pieces."""

    def __init__(self, shared: Shared, compiled: Compiled, place: int, piece: Piece) -> None:
        self._shared = shared
        self._compiled = compiled
        self._place = place
        self._piece = piece
        self._called = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._shared.enabled:
            if self._shared.call_log.tracker.session.explicit is None:
                value = self._shared.call_log.read(inputs[self._place])
                self._shared.tell(self._piece, value)
            self._shared.uncached(NO_BLOCKS, self._called)
            self._called = True
        return self._compiled(*inputs)


class PassingGraph:
    """A graph with blocks that is not cached because gradients are required: its calls are steps.

    A call counts if the backend has a cached graph for inputs like its own.
    """

    def __init__(
        self, shared: Shared, compiled: Compiled, outlined: Outlined, piece: Piece
    ) -> None:
        self._shared = shared
        self._compiled = compiled
        self._outlined = outlined
        self._piece = piece

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._shared.enabled:
            with torch.no_grad():
                self._pass(inputs)
        return self._compiled(*inputs)

    def _pass(self, inputs: Sequence[Any]) -> None:
        outlined, shared = self._outlined, self._shared
        given = [*inputs]
        if outlined.number_step is not None:
            given[outlined.number_step] = torch.as_tensor(given[outlined.number_step])
        value = step_value(shared, outlined, self._piece, given)
        tensors = dict(zip(outlined.names, (given[i] for i in outlined.tensors), strict=True))
        lowered = self._like(tensors)
        if value is not None and lowered is not None:
            self._count(lowered, value, tensors)

    def _like(self, tensors: Mapping[str, torch.Tensor]) -> Lowered | None:
        """Return the newest cached graph for tensors like these."""
        outlined = self._outlined
        own = {n: TensorSpec.of(t) for n, t in tensors.items() if n not in outlined.owned}
        specs = {s for s in own.items() if s[0] != outlined.timestep_argument or s[1].shape}
        like = [p for p in [*self._shared.programs] if p.signature == specs]
        return max(like, key=lambda lowered: lowered.serial, default=None)

    def _count(
        self, lowered: Lowered, value: TimestepValue, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        call_log = self._shared.call_log
        session = call_log.tracker.session
        none = torch.empty(0)  # for the model's own, which do not matter
        given = [tensors.get(name, none) for name in lowered.program.inputs]
        with session.lock:
            derived = not self._piece.first
            call = call_log.evidence(session, lowered, lowered.signature, value, given, derived)
            call_log.passed(session, call)
