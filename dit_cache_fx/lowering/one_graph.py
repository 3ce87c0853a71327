"""Lower to one graph that contains the decision, for `torch.compile` and `torch.export`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dit_cache_fx.ir.copying import results_of
from dit_cache_fx.ir.graph_module import inline
from dit_cache_fx.ir.graph_text import trace_graph
from dit_cache_fx.ir.names import state_name
from dit_cache_fx.ir.nodes import tensor_spec
from dit_cache_fx.ir.program import Program
from dit_cache_fx.lowering.part import Part, runnable
from dit_cache_fx.lowering.preamble import Preamble, pinned, split_preamble
from dit_cache_fx.lowering.variants import Variants
from dit_cache_fx.strategies import CLOCK, Clock, RuleState, Strategy
from dit_cache_fx.strategies.decision import begun, decided, device_of
from dit_cache_fx.strategies.signals import in_one, signal_of
from dit_cache_fx.strategies.traced import traced
from dit_cache_fx.values.identity import storage_key
from dit_cache_fx.values.tensor_spec import TensorSpec

#: the kinds of steps, as in `Variants`
_KINDS = ("compute", "reuse")
#: a boolean on the host
FLAG = TensorSpec(torch.Size([]), torch.bool, torch.device("cpu"))


@dataclass(frozen=True)
class OneGraph:
    """A program as one graph.

    `part` gives `outputs` values of the model, then the tensors to cache. Besides the inputs of the
    variants it reads `forced`: whether the step computes. If it runs the strategy's rule (`asks`),
    it also reads `fresh` (the state is not valid yet; both are booleans on the CPU) and the rule's
    `state` (name -> spec), and its results end with the decision, whether the state is `lost` (the
    next step must pass `fresh`), and the new state. `operands` gives values without dimensions as
    one-element tensors.

    The `preambles` of the two kinds of steps run on the host first (and the rule before them): then
    the graph runs no rule, and reads the tensors that the prefix carries and the preambles'
    results. A rule that reads no value of the model also runs on the host, if there is one.
    """

    part: Part
    outputs: int
    asks: bool
    state: dict[str, TensorSpec]
    preambles: Mapping[str, Preamble]

    def operands(self, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the graph's operands, in the form that it takes.

        Dynamo may treat a tensor of no dimensions as a number that does not change.
        """
        return [t if t.ndim else t.reshape(1) for t in self.part.operands(given)]

    def operands_apart(self, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Like `operands`, on the host, in separate memory: `cond` takes no two views of one."""
        taken: set[int] = set()
        return [_apart(t, taken) for t in self.operands(given)]


def lower_one_graph(
    program: Program, variants: Variants, strategy: Strategy, carry: bool = False
) -> OneGraph:
    """Join the variants of a program in one graph.

    After (no rule):

        %cond = cond(%forced, compute, reuse, (%cached_h_0, %x, %t))
        %out = getitem(%cond, 0)
        %h = getitem(%cond, 1)
        return (%out, %h)

    `compute` and `reuse` are the variants; `cond` requires that no result is an operand's memory.
    `reuse` returns the cached tensors if they are carried on (`carry`), otherwise tensors without
    values. Carried state is for programs without a host: then there is no preamble, and the sizes
    of masked selections are fixed.
    """
    return _Writer(program, variants, strategy, carry).write()


class _Writer:
    def __init__(
        self, program: Program, variants: Variants, strategy: Strategy, carry: bool
    ) -> None:
        self.program = program
        self.variants = variants
        self.strategy = strategy
        self.carry = carry
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.preambles = {} if carry else self._preambles()
        self.asks = strategy.has_rule and (carry or self._rule_fits())
        self.state = self._state_specs() if self.asks else {}

    def write(self) -> OneGraph:
        given = self._placeholders()
        predicate, decided = given.pop("forced"), list[fx.Node]()
        if self.asks:
            state = [given.pop(name) for name in ("fresh", *self.state)]
            decided = self._decide([*self._looked_at(given), predicate, *state])
            predicate = decided[0]
        self.graph.output((*self._cond(predicate, given), *decided))
        part = Part.of(self.program.model, self.attributes, self.graph, "OneGraph")
        trace_graph("one_graph", part.gm)
        return OneGraph(part, self.variants.outputs, self.asks, self.state, self.preambles)

    def _preambles(self) -> dict[str, Preamble]:
        """Return the preambles of the two kinds of steps, with different names of their results."""
        variants = self.variants
        compute = split_preamble(variants.compute, variants.cached)
        reuse = split_preamble(variants.reuse, variants.cached, "reused_")
        found = {"compute": compute, "reuse": reuse}
        return {kind: preamble for kind, preamble in found.items() if preamble is not None}

    def _rule_fits(self) -> bool:
        """Return whether the graph can run the rule: no size depends on data, and it reads one."""
        prefix, held = self.variants.prefix, self.variants.cached
        whole = prefix is not None and split_preamble(prefix, held) is None
        return whole and not self.preambles

    def _placeholders(self) -> dict[str, fx.Node]:
        """Add a placeholder for every operand, by name, and restore shapes without dimensions."""
        inputs = {name: tensor_spec(self.program.node(name)) for name in self.program.inputs}
        rule = {"fresh": FLAG, **self.state} if self.asks else {}
        specs = {"forced": FLAG, **rule, **CLOCK, **self.variants.cached, **inputs}
        if not self.asks:
            specs |= {n: tensor_spec(self.program.node(n)) for n in self.variants.carried}
        for preamble in self.preambles.values():
            specs |= preamble.given
        given = {name: self.graph.placeholder(name) for name in specs}
        for name in (name for name, spec in specs.items() if not spec.shape):
            given[name] = self.graph.call_function(
                torch.ops.aten.reshape.default, (given[name], [])
            )
        return given

    # --- the strategy's own rule ---------------------------------------------------------------

    def _looked_at(self, given: dict[str, fx.Node]) -> list[fx.Node]:
        """Return all operands of a rule: the clock, the measurements, and the model's value."""
        variants = self.variants
        seen = [given[name] for name in (*CLOCK, *variants.measured)]
        if variants.prefix is None:
            return seen
        prefix = pinned(variants.prefix, ()) if self.carry else variants.prefix
        called = prefix.operands(given)
        value, *carried = inline(self.graph, self.attributes, prefix.gm, called)
        carried = [self._flat(self._apart(n, {*carried, *called})) for n in carried]
        given.update(zip(variants.carried, carried, strict=True))
        return [*seen, value]

    def _seen_specs(self) -> dict[str, TensorSpec]:
        """Return the specs of a rule's operands by name, in the same order."""
        specs = {f"clock.{name}": spec for name, spec in CLOCK.items()}
        specs |= {name: self.variants.cached[name] for name in self.variants.measured}
        signal = self.program.signal
        return specs if signal is None else {**specs, "signal": tensor_spec(signal)}

    def _signal(self, seen: Sequence[torch.Tensor]) -> Any:
        """Return the rule's operands in the strategy's form."""
        fields, measures = len(CLOCK), len(self.variants.measured)
        measured = in_one(seen[fields : fields + measures])
        value = seen[-1] if len(seen) > fields + measures else None
        return signal_of(self.strategy, value, Clock(*seen[:fields]), measured)

    def _decide(self, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """Add the decision and whether the state is lost, on the CPU, and the new state.

        Here the host waits for the device.
        """
        looked_at, flags = self._seen_specs(), {"forced": FLAG, "fresh": FLAG}

        def decide(*given: torch.Tensor) -> list[torch.Tensor]:
            signal = self._signal(given[: len(looked_at)])
            forced, fresh, *state = given[len(looked_at) :]
            anew, first = fresh.to(device_of(signal)), begun(self.strategy, signal)
            answer = decided(self.strategy, signal, tuple(state), forced.to(anew.device))
            begins = anew | answer.doubted
            new = [torch.where(begins, a, b) for a, b in zip(first, answer.state, strict=True)]
            return [*torch.stack([answer.computes | anew, answer.lost]).to("cpu"), *new]

        given = {**looked_at, **flags, **self.state}
        gm = traced(self.strategy, "should_compute", decide, given)
        return inline(self.graph, self.attributes, gm, operands)

    def _state_specs(self) -> dict[str, TensorSpec]:
        """Return the specs of the rule's state."""

        def begin(*seen: torch.Tensor) -> RuleState:
            return begun(self.strategy, self._signal(seen))

        first = traced(self.strategy, "init_state", begin, self._seen_specs())
        results = results_of(first.graph)
        return {state_name(i): tensor_spec(node) for i, node in enumerate(results)}

    def _apart(self, node: fx.Node, others: set[fx.Node]) -> fx.Node:
        """Copy a module's result that may be its input: `cond` takes each memory once."""
        call = node
        while call.target is operator.getitem:
            call = call.all_input_nodes[0]
        shared = call.op == "call_module" and not others.isdisjoint(call.all_input_nodes)
        return _own(self.graph, node) if shared else node

    def _flat(self, node: fx.Node) -> fx.Node:
        """Flatten a tensor: Inductor may choose another layout than `cond`'s branches expect."""
        return self.graph.call_function(torch.ops.aten.reshape.default, (node, [-1]))

    # --- the decision --------------------------------------------------------------------------

    def _cond(self, predicate: fx.Node, given: dict[str, fx.Node]) -> list[fx.Node]:
        variants = self.variants
        branches = {kind: self._side(kind, getattr(variants, kind)) for kind in _KINDS}
        read = {name for part in branches.values() for name in part.names}
        read |= set(variants.cached if self.carry else ())
        names = [name for name in given if name in read]
        for kind, part in branches.items():
            self.attributes[kind] = self._branch(part, names, hold=kind == "compute")
        sides = [self.graph.get_attr(kind) for kind in branches]
        operands = tuple(given[name] for name in names)
        cond = self.graph.call_function(torch.cond, (predicate, *sides, operands))
        results = range(variants.outputs + len(variants.cached))
        return [self.graph.call_function(operator.getitem, (cond, i)) for i in results]

    def _side(self, kind: str, part: Part) -> Part:
        """Return the graph of a kind of step without sizes that depend on data."""
        if self.carry:
            return pinned(part, self.variants.cached)
        return self.preambles[kind].rest if kind in self.preambles else part

    def _branch(self, part: Part, names: Sequence[str], hold: bool) -> fx.GraphModule:
        """Return a variant with these operands, and results in memory of their own."""
        graph, attributes = fx.Graph(), dict[str, Any]()
        given = {name: graph.placeholder(name) for name in names}
        for name in self.variants.carried if self.asks else ():
            if name in given:
                shape = list(tensor_spec(self.program.node(name)).shape)
                given[name] = graph.call_function(
                    torch.ops.aten.reshape.default, (given[name], shape)
                )
        results = inline(graph, attributes, part.gm, part.operands(given))
        results = [_own(graph, node) for node in results]
        if not hold and self.carry:
            results += [_own(graph, given[name]) for name in self.variants.cached]
        elif not hold:
            results += [_valueless(graph, spec) for spec in self.variants.cached.values()]
        graph.output(tuple(results))
        return runnable(self.program.model, attributes, graph, part.gm._get_name())


def _apart(tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """Return the tensor, or a copy if its memory is in `taken`; add the memory to `taken`."""
    if not tensor.numel() or is_traceable_wrapper_subclass(tensor):  # no memory of its own
        return tensor
    if storage_key(tensor) in taken:
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(storage_key(tensor))
    return tensor


def _own(graph: fx.Graph, node: fx.Node) -> fx.Node:
    form: dict[str, Any] = {"memory_format": torch.contiguous_format}
    return graph.call_function(torch.ops.aten.clone.default, (node,), form)


def _valueless(graph: fx.Graph, spec: TensorSpec) -> fx.Node:
    form: dict[str, Any] = {"dtype": spec.dtype, "device": spec.device}
    return graph.call_function(torch.ops.aten.empty.memory_format, (list(spec.shape),), form)
