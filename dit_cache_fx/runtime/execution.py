"""The graphs that a call runs, one after another, whatever compiles them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dit_cache_fx._torch import CANNOT_COMPILE, not_a_compiled_frame, signatures_kept
from dit_cache_fx.capture import FlatCall
from dit_cache_fx.lowering import CompiledPart, Part, Preamble, Variants, split_preamble
from dit_cache_fx.runtime.drive import Compiler, Results, Serving, Stage, drive_here, lasting
from dit_cache_fx.runtime.graphs import Entry
from dit_cache_fx.runtime.step import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Separate:
    """Variants whose graphs are compiled. `preamble`: what the host runs before a computed step."""

    variants: Variants
    preamble: Preamble | None


class StepCompiler:
    """Compiles with the `options` of `torch.compile`, each graph when it is called first.

    Raises what `torch.compile` raises for options that it does not take.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        torch.compile(_nothing, **options)
        self._options = options
        self._made: WeakKeyDictionary[Variants, Separate] = WeakKeyDictionary()

    def compiled(self, variants: Variants) -> Separate:
        """The same variants, compiled."""
        made = self._made.get(variants)
        if made is None:
            preamble = split_preamble(variants.compute)
            whole = variants if preamble is None else replace(variants, compute=preamble.compute)
            made = self._made[variants] = Separate(whole.mapped(self._part), preamble)
        return made

    def _part(self, part: Part) -> Part:
        return CompiledPart(part.gm, part.names, _Whole(part.run, self._options))


class _Whole:
    """A compiled graph; where its blocks break it, and may, the blocks are compiled one by one."""

    def __init__(self, forward: Callable[..., Results], options: Mapping[str, Any]) -> None:
        self._forward = forward
        self._options = options
        self._compiled = torch.compile(forward, **{**options, "fullgraph": True})

    def __call__(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        try:
            results = self._compiled(*operands)
        except CANNOT_COMPILE as error:
            if self._options.get("fullgraph"):
                raise
            log.info("no single graph for a kind of step, so its blocks one by one: %s", error)
            not_a_compiled_frame(self._forward)
            self._compiled = torch.compile(self._forward, **self._options)
            results = self._compiled(*operands)
        return lasting(results)


def _nothing() -> None:
    return None


def plain(entry: Entry, step: Step, call: FlatCall) -> Serving:
    """Run the graph of the step's kind; the decision is the host's."""
    variants, given = entry.variants, entry.inputs(call)
    yield from _ruled(entry, variants, step, given)
    part = variants.compute if step.computes else variants.reuse
    given.update(step.given(part.names))
    return (yield Stage(part.run, part.operands(given), entry.captured.around))


def separate(entry: Entry, step: Step, call: FlatCall, compiled: Separate) -> Serving:
    """The same, where each graph was compiled by itself."""
    variants, given = compiled.variants, entry.inputs(call)
    yield from _ruled(entry, variants, step, given)
    if step.computes and compiled.preamble is not None:
        given.update(_prepared(entry, compiled.preamble, step, given))
    part = variants.compute if step.computes else variants.reuse
    given.update(step.compiled_given(part.names))
    results = yield Stage(part.run, part.operands(given), entry.captured.around)
    outputs, kept = results[: variants.outputs], results[variants.outputs :]
    return [*outputs, *(t.contiguous() for t in kept)]  # the strides that it is compiled for


def watched(entry: Entry, step: Step, call: FlatCall, compiler: Compiler) -> Serving:
    """Run one graph; where its blocks break it, and may, one for each kind of step."""
    if not entry.breaks or compiler is Compiler.FULLGRAPH:
        try:
            return (yield from _one_graph(entry, step, call))
        except CANNOT_COMPILE as error:
            if compiler is Compiler.FULLGRAPH:
                raise
            log.info("no single graph, so one for each kind of step: %s", error)
        entry.broken()
    return (yield from plain(entry, step, call))


def _one_graph(entry: Entry, step: Step, call: FlatCall) -> Serving:
    """Run the graph that has the decision in it."""
    one, given = entry.one_graph, entry.inputs(call)
    if one.preamble is not None:  # what the graph cannot hold is the host's, the rule first
        drive_here(_ruled(entry, entry.variants, step, given))
        given.update(_prepared(entry, one.preamble, step, given))
        given.update((name, _contiguous(given[name])) for name in entry.variants.carried)
    given.update(step.one_graph_given(one.part.names, one.memory))
    with signatures_kept():
        results = yield Stage(one.part.run, one.operands(given), entry.captured.around)
    values = one.outputs + len(entry.variants.held)
    if one.memory:
        step.decided(*results[values:])
    return results[:values]


def _ruled(entry: Entry, variants: Variants, step: Step, given: dict[str, torch.Tensor]) -> Serving:
    """Ask the strategy's own rule, where it has one; what its graph carries on is given then."""
    if variants.prefix is not None:
        prefix, around = variants.prefix, entry.captured.around
        signal, *carried = yield Stage(prefix.run, prefix.operands(given), around)
        given.update(zip(variants.carried, carried, strict=True))
        step.decide(signal)


def _prepared(
    entry: Entry, preamble: Preamble, step: Step, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run the preamble on the host."""
    part = preamble.part
    operands = part.operands({**given, **step.given(part.names)})
    with torch.no_grad(), entry.captured.around():
        results = step.prepared(preamble.given, lambda: part.run(*operands))
    return {n: _contiguous(t) for n, t in zip(preamble.given, results, strict=True)}


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
