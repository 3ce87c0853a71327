"""`Backend`: the object that `torch.compile` calls with each graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn

from dit_cache_fx._torch import compiled_frame, piece_of
from dit_cache_fx.dynamo.beside import NotingGraph, PassingGraph
from dit_cache_fx.dynamo.graph import CachedGraph
from dit_cache_fx.dynamo.inner import Compile, Inner, inner_compiler
from dit_cache_fx.dynamo.outlined import outlined_graph
from dit_cache_fx.dynamo.shared import NO_BLOCKS, Compiled, Shared
from dit_cache_fx.life_cycle import LifeCycle
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.ranks import found
from dit_cache_fx.runtime.call_log import WANTS_GRADIENTS, CallLog
from dit_cache_fx.strategies import Strategy


class Backend(LifeCycle):
    """A backend for `torch.compile`, made by `backend`.

    Pass it as `torch.compile(model, backend=...)`. One object serves one model: its life cycle is
    that model's.

    Example:
        >>> cache = dit_cache_fx.backend("taylorcache", computed_steps=10, num_steps=50)
        >>> compiled = torch.compile(model, backend=cache)
    """

    def __init__(
        self,
        strategy: Strategy,
        inner: Inner,
        mode: str | None,
        options: Mapping[str, Any] | None,
        blocks: Sequence[str | nn.ModuleList] | None,
        timestep: str | None,
    ) -> None:
        self._inner = inner
        self._compile = inner_compiler(inner, mode, options)
        self._blocks = blocks
        self._timestep = timestep
        self._shared = Shared(CallLog(strategy))
        self._graphs: WeakSet[CachedGraph] = WeakSet()

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compile a graph of `torch.compile`; `mode` and `options` go to the inner backend."""
        compile_graph = self._compile
        if mode is not None or options is not None:
            compile_graph = inner_compiler(self._inner, mode, options)
        return self._made(gm, example_inputs, compile_graph)

    def _made(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], compile_graph: Compile
    ) -> Compiled:
        piece, frame = piece_of(gm), compiled_frame()
        piece = piece._replace(whole=piece.whole and not frame.inner)
        if self._shared.ranks is None:
            tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
            self._shared.ranks = found(frame.outer, tensors)
        self._shared.split |= not piece.whole
        outlined = outlined_graph(
            gm, example_inputs, self._blocks, self._timestep, piece.whole, frame
        )
        position = outlined.timestep_position
        wanted = torch.is_grad_enabled() and any(map(_requires_grad, example_inputs))
        if outlined.lists and not wanted:
            plain = compile_graph(gm, example_inputs) if outlined.only_now else None
            graph = CachedGraph(self._shared, compile_graph, outlined, piece, plain)
            self._graphs.add(graph)
            return graph
        compiled = compile_graph(gm, example_inputs)
        if wanted:
            self._call_log.warn_once(WANTS_GRADIENTS)
        if outlined.lists:
            return PassingGraph(self._shared, compiled, outlined, piece)
        if piece.whole and not wanted:
            self._shared.uncached(NO_BLOCKS, again=False)
        elif piece.first and position is not None:
            return NotingGraph(self._shared, compiled, position, piece)
        return compiled

    # --- life cycle --------------------------------------------------------------------------

    @property
    def _call_log(self) -> CallLog:
        return self._shared.call_log

    @property
    def _enabled(self) -> bool:  # type: ignore[override]
        return self._shared.enabled

    @_enabled.setter
    def _enabled(self, value: bool) -> None:
        self._shared.enabled = value

    def _lowered(self) -> list[Lowered]:
        found = [lowered for graph in [*self._graphs] for lowered in graph.lowered()]
        once = {lowered.serial: lowered for lowered in found}
        return [once[serial] for serial in sorted(once)]

    def reset_states(self) -> None:
        """Forget everything, including graphs and counts."""
        self.clear_states()
        self._call_log.forget_calls()
        self._call_log.count.forget()
        for graph in self._graphs:
            graph.forget()

    def __repr__(self) -> str:
        return f"backend({self._call_log.strategy!r}, inner={self._inner!r})"


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
