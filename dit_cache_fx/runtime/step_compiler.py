"""Compile the graph of each kind of step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dit_cache_fx._torch import (
    breaks_raise,
    cannot_compile,
    not_a_compiled_frame,
    with_code_of_its_own,
)
from dit_cache_fx.ir.nodes import module_name
from dit_cache_fx.lowering import (
    CompiledPart,
    Part,
    Variants,
    compiled_variants,
    split_variants,
)
from dit_cache_fx.runtime.drive import Results, lasting
from dit_cache_fx.runtime.first_runs import FirstRuns
from dit_cache_fx.runtime.tracking.hooks import Hooks

#: the largest number of sets of hooks that a graph is compiled for; with others it runs as it is
MAX_HOOKED = 8

log = logging.getLogger(__name__)


class StepCompiler:
    """Compiles each graph on its first call, with the `options` of `torch.compile`.

    Raises the errors of `torch.compile` for options that it does not take.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        torch.compile(_nothing, **options)
        self.options = dict(options)
        self._made: WeakKeyDictionary[Variants, Variants] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def compiled(self, variants: Variants) -> Variants:
        """Return the same variants, compiled."""
        with self._lock:
            made = self._made.get(variants)
            if made is None:
                made = compiled_variants(split_variants(variants), self._part)
                self._made[variants] = made
            return made

    def _part(self, part: Part) -> Part:
        return CompiledPart(part.gm, part.names, _ByHooks(part, self.options))


class _ByHooks:
    """A graph, compiled for each set of hooks on its layers: Dynamo does not see new ones."""

    def __init__(self, part: Part, options: Mapping[str, Any]) -> None:
        self._part = part
        self._options = options
        called = {module_name(n) for n in part.gm.graph.find_nodes(op="call_module")}
        model = part.gm.get_submodule("model")
        self._hooks = Hooks(nn.ModuleList(model.get_submodule(name) for name in called))
        self._made: dict[Hashable, _Whole] = {}
        self._lock = threading.Lock()

    def __call__(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        hooks = self._hooks.ids()
        whole = self._made.get(hooks) or self._compiled(hooks)
        return self._part.run(*operands) if whole is None else whole(*operands)

    def _compiled(self, hooks: Hashable) -> _Whole | None:
        """Return the graph for these hooks; None if there were too many sets of them."""
        with self._lock:
            if hooks not in self._made and len(self._made) < MAX_HOOKED:
                forward = with_code_of_its_own(self._part.run) if hooks else self._part.run
                self._made[hooks] = _Whole(forward, self._options)
            return self._made.get(hooks)


class _Whole:
    """A compiled graph. If its blocks break it, and may, they are compiled one by one."""

    def __init__(self, forward: Callable[..., Results], options: Mapping[str, Any]) -> None:
        self._forward = forward
        self._options = options
        self._compiled = torch.compile(forward, **{**options, "fullgraph": False})
        self._broken = False
        self._first_runs = FirstRuns()

    def __call__(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        with self._first_runs.alone():
            return lasting(self._run(operands))

    def _run(self, operands: Sequence[torch.Tensor]) -> Results:
        try:
            with nullcontext() if self._broken else breaks_raise():
                return self._compiled(*operands)
        except cannot_compile() as error:
            if self._broken or self._options.get("fullgraph"):
                raise
            log.info(
                "cannot compile a step as one graph, so its blocks are compiled one by one: %s",
                error,
            )
            not_a_compiled_frame(self._forward)
            self._broken = True
            return self._compiled(*operands)


def _nothing() -> None:
    return None
