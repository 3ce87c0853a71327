"""The sequence of graphs in a call, for each kind of compilation."""

from __future__ import annotations

import logging

import torch

from dit_cache_fx._torch import cannot_compile, signatures_kept
from dit_cache_fx.capture import FlatCall
from dit_cache_fx.lowering import Variants, own_copy
from dit_cache_fx.runtime.batch.row_steps import RowSteps
from dit_cache_fx.runtime.drive import NOTHING, Compiler, GraphCall, Serving, drive
from dit_cache_fx.runtime.entry import Entry
from dit_cache_fx.runtime.step import Step

log = logging.getLogger(__name__)


def plain(
    entry: Entry, step: Step | RowSteps, call: FlatCall, compiler: Compiler = NOTHING
) -> Serving:
    """Run the graph of the step's kind; the host decides."""
    variants, given = entry.variants, entry.inputs(call)
    if entry.strategy.has_rule:
        yield from _ruled(entry, variants, step, given)
    part = variants.compute if step.computes else variants.reuse
    given.update(step.given(part.names))
    graph_call = GraphCall(part.run, part.operands(given), entry.captured.around)
    return (yield from _alone(entry, step, graph_call, compiler))


def compiled_steps(
    entry: Entry, step: Step, call: FlatCall, compiled: Variants, compiler: Compiler = NOTHING
) -> Serving:
    """Like `plain`, with each graph compiled by itself."""
    given = entry.inputs(call)
    yield from _ruled(entry, compiled, step, given)
    return (yield from decided(entry, step, given, compiled, compiler))


def decided(
    entry: Entry,
    step: Step | RowSteps,
    given: dict[str, torch.Tensor],
    variants: Variants,
    compiler: Compiler = NOTHING,
) -> Serving:
    """Run the graph of a step's kind. `given`: the call's tensors, and the carried ones."""
    part = variants.compute if step.computes else variants.reuse
    given.update(step.compiled_given(part.names))
    graph_call = GraphCall(part.run, part.operands(given), entry.captured.around)
    results = yield from _alone(entry, step, graph_call, compiler)
    outputs, recorded = results[: variants.outputs], results[variants.outputs :]
    return [*outputs, *(t.contiguous() for t in recorded)]  # the compiled strides


def _alone(
    entry: Entry, step: Step | RowSteps, graph_call: GraphCall, compiler: Compiler
) -> Serving:
    """Run a graph; under a compiler, the first one of each kind of step runs exclusively."""
    if not compiler.looks_on:
        return (yield graph_call)
    with entry.first_runs.alone((compiler, step.computes)):
        return (yield graph_call)


def watched(entry: Entry, step: Step, call: FlatCall, compiler: Compiler) -> Serving:
    """Run one graph; if there can be none, one for each kind of step.

    There is none if the blocks break it, or if `cond` does not support their weights (tensor
    subclasses, or views of one another).
    """
    whole = compiler.fullgraph
    if not (entry.apart if whole else entry.breaks or entry.apart):
        try:
            return (yield from _one_graph(entry, step, call, compiler))
        except cannot_compile() as error:
            log.info("cannot make a single graph, so there is one for each kind of step: %s", error)
    steps = _whole_steps if whole or entry.apart else _steps
    return (yield from steps(entry, step, call, compiler))


def _whole_steps(entry: Entry, step: Step, call: FlatCall, compiler: Compiler) -> Serving:
    """Run one graph for each kind of step, without graph breaks."""
    results = yield from compiled_steps(entry, step, call, entry.compiled_steps, compiler)
    entry.apart = True
    return results


def _steps(entry: Entry, step: Step, call: FlatCall, compiler: Compiler) -> Serving:
    """Run one graph for each kind of step; graph breaks are allowed."""
    if not entry.breaks:
        entry.broken()
    return (yield from plain(entry, step, call, compiler))


def _one_graph(entry: Entry, step: Step, call: FlatCall, compiler: Compiler) -> Serving:
    """Run the graph that contains the decision."""
    one, given = entry.one_graph, entry.inputs(call)
    if not one.asks:  # the host runs what the graph cannot, the rule first
        rule = _ruled(entry, entry.compiled_steps, step, given)
        if entry.rule_runs_blocks:
            with entry.first_runs.alone((compiler, "rule")):
                yield from rule
        else:
            drive(rule)
        given.update((name, own_copy(given[name])) for name in entry.variants.carried)
    if one.preambles:
        with entry.captured.around():
            given.update(step.prepared(one.preambles, given))
    given.update(step.one_graph_given(one.part.names, one.state, one.asks))
    graph_call = GraphCall(one.part.run, one.operands_apart(given), entry.captured.around_parts)
    with entry.first_runs.alone(compiler) as first:
        results = yield from _compiled(graph_call, first)
    values = one.outputs + len(entry.variants.cached)
    if one.asks:
        step.decided(*results[values:])
    return results[:values]


def _compiled(graph_call: GraphCall, first: bool) -> Serving:
    """Run a graph under `torch.compile`.

    Dynamo is patched while it compiles: at the first run, and when a later one needs it.
    """
    if not first:
        try:
            return (yield graph_call)
        except cannot_compile() as error:
            log.info("compiling again: %s", error)
    with signatures_kept():
        return (yield graph_call)


def _ruled(
    entry: Entry, variants: Variants, step: Step | RowSteps, given: dict[str, torch.Tensor]
) -> Serving:
    """Run the strategy's rule, if it has one; pass on the tensors that its graph carries."""
    value: torch.Tensor | None = None
    if variants.prefix is not None:
        prefix, around = variants.prefix, entry.captured.around_parts
        value, *carried = yield GraphCall(prefix.run, prefix.operands(given), around)
        given.update(zip(variants.carried, carried, strict=True))
    step.decide(value)
