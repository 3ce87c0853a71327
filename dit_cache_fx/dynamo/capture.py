"""Turn Dynamo's graph, called with tensors of certain shapes, into a `Program`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import fakes, is_sized_by_data
from dit_cache_fx.capture import BlockList, flatten_call
from dit_cache_fx.capture.blocks import mark_blocks
from dit_cache_fx.capture.normal_form import normal_form
from dit_cache_fx.capture.record import record
from dit_cache_fx.capture.recording import Recording
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.capture.signal import mark_signal, parts_of
from dit_cache_fx.capture.trace import trace
from dit_cache_fx.dynamo.outline import LEAVES
from dit_cache_fx.dynamo.reads import Checked, Reads
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.copying import results_of
from dit_cache_fx.ir.nodes import ancestors, module_name, spec_of
from dit_cache_fx.ir.program import Program
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.strategies.signals import value_of
from dit_cache_fx.values.identity import storage_key, version

_SIZED = (
    "a size in it depends on data (a selection by a mask, for example). Use "
    "dit_cache_fx.apply(model, ...), then torch.compile or compile_steps()"
)

#: Dynamo's graph takes tensors and, with dynamic shapes, numbers
Input = torch.Tensor | int | float


@dataclass(frozen=True)
class Outlined:
    """Dynamo's graph with its blocks as calls again, and a description of its inputs.

    `dynamos`: the original graph. `tensors`: the indexes of the inputs that are tensors; for each
    of these `names` has a unique name and `origins` Dynamo's node; the model's own are in `owned`.
    `given`: all other inputs. `numbers`: tensors that `gm` takes as numbers. `timestep_argument`:
    the name of the timestep, if there is one. `constant`: its value if it is a constant of the
    graph. `number_step`: the index of the timestep's input if Dynamo passes it as a number.
    `elsewhere`: the model's lists in other pieces: name -> number of blocks. `order`: the arguments
    of the compiled function.
    """

    dynamos: fx.GraphModule
    gm: fx.GraphModule
    lists: tuple[BlockList, ...]
    chosen: bool  # the user named the lists
    tensors: tuple[int, ...]
    names: tuple[str, ...]
    origins: tuple[fx.Node, ...]
    owned: frozenset[str]
    constant: float | None
    numbers_beside: frozenset[tuple[str, float]]  # other numbers that the function was called with
    elsewhere: Mapping[str, int]
    order: tuple[str, ...]
    given: tuple[int, ...]
    numbers: tuple[int, ...]
    number_step: int | None
    dynamic: bool  # some inputs are sizes
    timestep_argument: str | None
    reads: Reads | None  # computes the inputs of `gm` that Dynamo's graph reads from tensors
    asks: bool  # Dynamo's graph reads such values, separable or not
    only_now: bool  # it can be compiled only while Dynamo knows its read values and sizes

    @property
    def read(self) -> int:
        """The number of inputs of `gm` that are read from tensors: the last ones."""
        return 0 if self.reads is None else self.reads.count

    @cached_property
    def timestep_position(self) -> int | None:
        """The index of the timestep's input."""
        if self.timestep_argument is None:
            return None
        return self.tensors[self.names.index(self.timestep_argument)]


@dataclass(frozen=True)
class Traced:
    """A program, and the block calls that its shapes come from."""

    program: Program
    recording: Recording
    blocks: tuple[str, ...]
    changed: tuple[int, ...]  # the tensors that the graph changes in place


def capture_graph(outlined: Outlined, inputs: Sequence[Input], strategy: Strategy) -> Traced:
    """Trace the program for inputs of these shapes, without computing anything.

    Raises `DiscoveryError` if the blocks cannot be determined, `CaptureError` if there is no
    program.
    """
    with fakes(inputs) as faked, torch.no_grad():
        tensors = [value for value in faked if isinstance(value, torch.Tensor)]
        call = flatten_call(dict(zip(outlined.names, tensors, strict=True)), None)
        members = _members(outlined.lists)
        leaves = {**members, **_leaves(outlined.gm)}
        looks_inside = value_of(strategy) == "modulated"
        opened = [blocks.modules[0] for blocks in outlined.lists] if looks_inside else []
        parts = {m: parts_of(m, members[m]) for m in opened if m in members}

        def run(given: Sequence[torch.Tensor]) -> Any:
            rest = iter(given)
            values = [next(rest) if isinstance(v, torch.Tensor) else v for v in inputs]
            with NumberFactories(0.0):  # a number that Dynamo varies
                return Checked(outlined.gm).run(*values)

        if outlined.reads is not None and outlined.reads.random:
            raise CaptureError("the graph reads a value that depends on random numbers")
        try:
            versions = [version(t) for t in tensors]
            recording = record(lambda: run(tensors), leaves, set(members), opened=parts)
            changed = [i for i, t in enumerate(tensors) if version(t) != versions[i]]
            _refuse_changed_by_blocks(recording, [tensors[i] for i in changed])
            traced = trace(_returning(run, changed) if changed else run, tensors, leaves, recording)
        except Exception as error:
            why = _SIZED if is_sized_by_data(error) else str(error)
            raise CaptureError(f"the graph of the model cannot be traced: {why}") from error
        program, guards = normal_form(outlined.gm, traced, call, outlined.timestep_argument)
        if guards is not None and guards.inputs:  # otherwise it only reads constants
            raise CaptureError("the graph reads values from tensors")
        program.owned = outlined.owned
        program.sample = _sample(program, outlined.order)
        mark_blocks(program, outlined.lists, outlined.chosen)
        _refuse_changed_after_blocks(program, len(changed))
        mark_signal(program, strategy, recording)
    blocks = set(map(module_name, program.block_calls()))
    return Traced(program, recording, tuple(sorted(blocks)), tuple(changed))


def _returning(
    run: Callable[[Sequence[torch.Tensor]], Any], changed: Sequence[int]
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Return `run` with its output and the values of the tensors that it changes in place."""

    def run_apart(tensors: Sequence[torch.Tensor]) -> Any:
        own = [t.clone() if i in changed else t for i, t in enumerate(tensors)]
        return run(own), [own[i] for i in changed]

    return run_apart


def _refuse_changed_by_blocks(recording: Recording, tensors: Sequence[torch.Tensor]) -> None:
    theirs = {place for made in recording.calls for place in made.changed}
    if theirs & {storage_key(t) for t in tensors}:
        raise CaptureError("a block writes into a tensor that the model was called with")


def _refuse_changed_after_blocks(program: Program, changed: int) -> None:
    """Refuse a graph that writes results of its blocks into tensors from the caller."""
    outputs = results_of(program.graph)
    needed = ancestors(n for n in outputs[len(outputs) - changed :] if isinstance(n, fx.Node))
    if any(node in needed for node in program.block_calls()):
        raise CaptureError(
            "the model writes results of its blocks into a tensor that it was called with"
        )


def _sample(program: Program, order: Sequence[str]) -> str | None:
    """Return the argument that resembles the output most, the first in the function's `order`."""
    outputs = [
        s for n in program.graph.output_node().all_input_nodes if (s := spec_of(n)) is not None
    ]
    shape = outputs[0].shape if outputs else torch.Size()

    def likeness(spec: torch.Tensor) -> tuple[bool, int]:
        return spec.ndim == len(shape), sum(map(operator.eq, spec.shape, shape))

    given = {
        argument: spec
        for name, argument in zip(program.inputs, program.arguments, strict=True)
        if name not in program.owned and name != program.timestep_input
        if (spec := spec_of(program.node(name))) is not None and spec.ndim > 1
    }
    ordered = sorted(given, key=lambda name: order.index(name) if name in order else len(order))
    return max(ordered, key=lambda argument: likeness(given[argument]), default=None)


def _members(lists: Sequence[BlockList]) -> dict[nn.Module, str]:
    return {m: f"{blocks.name}.{i}" for blocks in lists for i, m in enumerate(blocks.modules)}


def _leaves(gm: fx.GraphModule) -> dict[nn.Module, str]:
    return {m: f"{LEAVES}.{n}" for n, m in getattr(gm, LEAVES, nn.Module()).named_children()}
