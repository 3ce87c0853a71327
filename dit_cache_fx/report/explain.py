"""The result of `explain()`: the structure found in the model, the held values, and the rule."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from dit_cache_fx.ir.cached_run import cached_runs
from dit_cache_fx.ir.copying import results_of
from dit_cache_fx.ir.graph_text import lines, ranges
from dit_cache_fx.ir.node_meta import block_of, is_block, meta_of
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.report.cache_report import schedule_of, size
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.strategies import Course, Strategy
from dit_cache_fx.strategies.signals import MEASURED, value_of
from dit_cache_fx.values.tensor_spec import TensorSpec

NOTHING_YET = (
    "nothing is captured yet: call the model once (under torch.no_grad()), then call explain() "
    "again"
)


@dataclass(frozen=True)
class RunExplanation:
    """Blocks that are cached together.

    Attributes:
        blocks (`tuple[str, ...]`):
            The names of the blocks.
        held (`tuple[tuple[str, TensorSpec], ...]`):
            The cached tensors: name, and shape, dtype and device.
    """

    blocks: tuple[str, ...]
    held: tuple[tuple[str, TensorSpec], ...]

    @property
    def nbytes(self) -> int:
        """The bytes held for each branch."""
        return sum(spec.nbytes for _, spec in self.held)

    def __str__(self) -> str:
        tensors = "\n".join(f"  holds {name}: {s}, {size(s.nbytes)}" for name, s in self.held)
        if len(self.blocks) == 1:
            return f"{self.blocks[0]}\n{tensors}"
        return f"{self.blocks[0]} .. {self.blocks[-1]} ({len(self.blocks)} blocks)\n{tensors}"


@dataclass(frozen=True)
class GraphExplanation:
    """One captured graph.

    Attributes:
        number (`int`):
            The number of the graph, as in `StepRecord.graph`.
        takes (`str`):
            The inputs of the calls that it answers.
        block_lists (`dict[str, int]`):
            The number of blocks in each block list.
        timestep (`str`):
            The source of the timestep, in words.
        runs (`tuple[RunExplanation, ...]`):
            The blocks that are cached together.
        always_run (`tuple[str, ...]`):
            The blocks that are never cached.
        data_guards (`tuple[str, ...]`):
            The values that the model's own code read from tensors at capture. A call that gives
            other values takes another graph.
        nodes (`int`):
            The number of nodes in the graph as captured.
        nodes_computed (`int`):
            The number of nodes that a computed step executes.
        nodes_reused (`int`):
            The number of nodes that a reused step executes.
        reused (`str`):
            The graph of a reused step, as text.
        graphs (`str`):
            The text of every graph, after `explain(full=True)`.
    """

    number: int
    takes: str
    block_lists: dict[str, int]
    timestep: str
    runs: tuple[RunExplanation, ...]
    always_run: tuple[str, ...]
    data_guards: tuple[str, ...]
    nodes: int
    nodes_computed: int
    nodes_reused: int
    reused: str
    graphs: str = ""

    def __str__(self) -> str:
        lists = ", ".join(f"{name} ({n} blocks)" for name, n in self.block_lists.items())
        parts = [
            f"block lists: {lists or 'none'}",
            f"timestep: {self.timestep}",
            *(f"cached run {i}: {run}" for i, run in enumerate(self.runs)),
            f"always run: {', '.join(self.always_run) or 'no block'}",
            _data_guards(self.data_guards),
            f"nodes: {self.nodes} captured, {self.nodes_computed} on a computed step, "
            f"{self.nodes_reused} on a reused step",
            f"a reused step executes:\n{textwrap.indent(self.reused, '  ')}",
        ]
        if self.graphs:
            parts.append(f"all graphs:\n{textwrap.indent(self.graphs, '  ')}")
        title = f"graph {self.number}, for {self.takes}"
        return f"{title}\n{textwrap.indent(chr(10).join(parts), '  ')}"


@dataclass(frozen=True)
class Explanation:
    """The cached values, and the steps that compute. Print it.

    Attributes:
        strategy (`str`):
            The name of the strategy.
        enabled (`bool`):
            Whether the cache is enabled.
        decides (`str`):
            The steps on which the blocks compute, in words.
        graphs (`tuple[GraphExplanation, ...]`):
            The captured graphs.

    Example:
        >>> explanation = cached.explain()
        >>> [run.blocks for run in explanation.graphs[0].runs]
        [('blocks.0', 'blocks.1', 'blocks.2')]
    """

    strategy: str
    enabled: bool
    decides: str
    graphs: tuple[GraphExplanation, ...]

    def __str__(self) -> str:
        name = self.strategy if self.enabled else f"{self.strategy} (disabled)"
        return "\n".join([f"{name}: {self.decides}", *(map(str, self.graphs or [NOTHING_YET]))])

    __repr__ = __str__


def explain(
    call_log: CallLog, entries: Sequence[Lowered], enabled: bool, full: bool = False
) -> Explanation:
    """Explain a cached model's graphs. `full`: add the text of every graph."""
    strategy = call_log.strategy
    return Explanation(
        strategy.name or type(strategy).__name__,
        enabled,
        _decides(strategy, call_log.course),
        tuple(_explained(entry, strategy, full) for entry in entries),
    )


def _explained(entry: Lowered, strategy: Strategy, full: bool) -> GraphExplanation:
    program = entry.program
    return GraphExplanation(
        number=entry.serial,
        takes=entry.takes,
        block_lists=dict(program.block_lists),
        timestep=f"argument {program.timestep_argument!r}"
        if program.timestep_argument
        else "set by the user, or known from an earlier graph",
        runs=tuple(_runs(entry, strategy)),
        always_run=tuple(str(block_of(call)) for call in program.block_calls()),
        data_guards=tuple(dict.fromkeys(entry.guards())),
        nodes=entry.nodes,
        nodes_computed=entry.nodes_computed,
        nodes_reused=entry.nodes_reused,
        reused="\n".join(_reused(entry)),
        graphs="\n".join(_graphs(entry)) if full else "",
    )


def _runs(entry: Lowered, strategy: Strategy) -> Iterator[RunExplanation]:
    program, cached = entry.program, iter(entry.variants.cached.values())
    for region, run in zip(program.regions, cached_runs(program.graph), strict=True):
        results = results_of(getattr(program.gm, run.compute).graph)
        names = [
            _cached_as(value, run_input, _source(result))
            for value, run_input, result in zip(
                region.values, region.run_inputs, results, strict=False
            )
        ]
        slots, measured = strategy.slots(), bool(entry.variants.measured)
        slotted = [
            name
            for n in names
            for name in (*_slots(n, slots), *([f"{MEASURED} of {n}"] if measured else []))
        ]
        tensors = tuple((name, next(cached)) for name in slotted)
        yield RunExplanation(tuple(map(str, region.blocks)), tensors)


def _slots(name: str, slots: int) -> list[str]:
    return [f"{name}, slot {i}" for i in range(slots)] if slots > 1 else [name]


def _cached_as(value: str, run_input: str | None, source: str | None) -> str:
    name = value if source is None else f"{value} of {source}"
    return name if run_input is None else f"{name}, less {run_input}"


def _source(node: fx.Node) -> str | None:
    """Return the block that a value comes from."""
    while not is_block(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    block = meta_of(node).block
    return None if block is None else str(block)


def _reused(entry: Lowered) -> Iterator[str]:
    """Yield the nodes that run on a reused step: first those for the rule, if there is one."""
    variants = entry.variants
    if variants.prefix is not None:
        yield from lines(variants.prefix.gm, "before_the_decision")
    yield from lines(variants.reuse.gm, "reused_step")


def _graphs(entry: Lowered) -> Iterator[str]:
    captured = entry.captured_graph()
    if captured is not None:
        yield from lines(captured, "captured", shapes=True)
    yield from lines(entry.program.gm, "after_the_passes", shapes=True)
    yield from lines(entry.variants.compute.gm, "computed_step", shapes=True)


def _decides(strategy: Strategy, course: Course | None) -> str:
    """Describe when the blocks are computed."""
    when = [f"on a generation's first step{_scheduled(strategy, course or strategy.course())}"]
    if strategy.has_rule:
        limit = strategy.threshold
        reaches = "" if limit is None else f" (measured against {limit:g})"
        seen = _SIGNALS.get(value_of(strategy), "its measurements on computed steps")
        when.append(f"when its rule on {seen} decides so{reaches}")
    when.append("and when nothing is held")
    return f"computes {', '.join(when)}; all other steps are {strategy.action}"


#: descriptions of the values that a rule reads
_SIGNALS: dict[str | None, str] = {
    "modulated": "the first block's modulated input",
    "input": "the first block's input",
    "conditioning": "the first block's conditioning",
    "embedding": "the timestep's embedding",
    "residual": "the residual of the first blocks",
    "sample": "the sample",
}


def _scheduled(strategy: Strategy, course: Course) -> str:
    steps, named = sorted(strategy.no_cache_steps or ()), schedule_of(strategy)
    num_steps = course.num_steps
    if named and num_steps is None:
        return f", on those of {named} once the number of steps is known"
    if named and num_steps is not None:
        steps = [step for step in range(num_steps) if course.computes(step)]
    of = f"those of {named}: " if named else "steps "
    return f", on {of}{ranges(steps)} ({len(steps)} in all)" if steps else ""


def _data_guards(guards: Sequence[str]) -> str:
    if not guards:
        return "data guards: none"
    return "data guards (other values lead to another graph):\n" + "\n".join(
        f"  {guard}" for guard in guards
    )
