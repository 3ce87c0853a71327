"""A captured graph: which calls it is right for, and its first answer without its blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import beside_distributed
from dit_cache_fx.capture.ambient import autocast, without_autocast
from dit_cache_fx.capture.check import compare
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.leaves import BlockList, candidate_lists, named_list
from dit_cache_fx.capture.normal_form import Guards
from dit_cache_fx.capture.outer_hook import own_forward
from dit_cache_fx.capture.record import ModuleCall, Recording
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.capture.settings import applied
from dit_cache_fx.capture.side_effects import unnoticed
from dit_cache_fx.capture.signature import CallSignature, FlatCall, unflatten_call
from dit_cache_fx.capture.turns import Turns
from dit_cache_fx.ir.graph_text import short
from dit_cache_fx.ir.node_meta import BlockId, meta_of
from dit_cache_fx.ir.program import Program, block_values
from dit_cache_fx.ranks import Ranks, every
from dit_cache_fx.strategies import Strategy, never_cached
from dit_cache_fx.strategies.signals import value_of
from dit_cache_fx.values.identity import TensorIdentity
from dit_cache_fx.values.pytree import unflatten


@dataclass(frozen=True)
class Subject:
    """What is captured: the model, how it is called, and where its blocks are looked for."""

    model: nn.Module
    signature: CallSignature
    blocks: tuple[str, ...] | None  # the block lists' names where the user gave them
    strategy: Strategy
    check: bool = True
    turns: Turns = field(default_factory=Turns)  # of threads, at its modules

    def lists(self) -> list[BlockList]:
        """The lists that may hold the trunk, as they are now."""
        if self.blocks is None:
            return candidate_lists(self.model)
        return [named_list(self.model, name) for name in self.blocks]

    def always_runs(self, name: str) -> bool:
        """Whether the block of this name may be one that is never cached.

        Before the trunk is found an alias ("double_blocks") can mean any of the lists, and any of
        them can be the first or the last.
        """
        list_name, _, index = name.rpartition(".")
        size = len([*self.model.get_submodule(list_name).children()])
        if self.strategy.always_runs(int(index), size):
            return True
        block = BlockId(list_name, int(index))
        return any(
            never_cached(block, self.strategy, lists) for lists in ((list_name,), ("", list_name))
        )

    def opened(self, lists: Sequence[BlockList]) -> list[nn.Module]:
        """The blocks whose inside is recorded, to find the strategy's signal there."""
        wanted = value_of(self.strategy) == "modulated"
        return [blocks.modules[0] for blocks in lists] if wanted else []

    def run(self, call: FlatCall, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's own answer to a flattened call with these tensors."""
        return self.answer(call, unflatten_call(call.skeleton, list(tensors)))

    def answer(self, call: FlatCall, arguments: dict[str, Any]) -> Any:
        """The same, for arguments by name."""
        with nullcontext() if call.number is None else NumberFactories(call.number):
            return self.signature.call(own_forward(self.model), arguments)


log = logging.getLogger(__name__)

#: the sizes of masked selections, which may differ from call to call
Shapes = tuple[torch.Size, ...]


@dataclass
class Captured:
    """A program that was checked, with what is needed to trust it on the next call."""

    program: Program
    gm: fx.GraphModule  # the graph as captured; the passes give the program others
    guards: Guards | None
    recording: Recording  # of the call that it was captured from, until that call is answered
    blocks: dict[nn.Module, str]
    whole: set[nn.Module]  # every module that the graph calls as a node
    accepted: set[Shapes]  # guard shapes that the graph was checked with
    turns: Turns  # of the model's graphs
    not_held: frozenset[str] = frozenset()  # block results that the recording did not hold
    #: the tensors of the newest call that the guards depend on, and its guard shapes
    newest: tuple[TensorIdentity, Shapes] | None = None
    unread: Sequence[str] = ()  # attributes that forward sets for others, in words
    spread: bool = False  # some of its tensors are distributed
    ranks: Ranks | None = None  # the processes that the model is spread over
    opened: tuple[Any, ...] = ()  # blocks with parts in the graph, their weights in shards

    def around(self) -> AbstractContextManager[None]:
        """Within it the graphs may run: without autocast, with what forward sets on its modules.

        Threads share the modules: where something is set there, no other graph runs meanwhile.
        """
        if self.recording.settings or self.spread or autocast():
            return self._around()
        return self.turns.beside()

    @contextmanager
    def _around(self) -> Iterator[None]:
        settings = self.recording.settings
        turn = self.turns.alone() if settings else self.turns.beside()
        beside = beside_distributed() if self.spread else nullcontext()
        with turn, without_autocast(), applied(settings), beside:
            yield

    @contextmanager
    def around_parts(self) -> Iterator[None]:
        """The same where parts of blocks run, whose weights a block has only while it runs."""
        with self.around():
            try:
                for block in self.opened:
                    block.unshard()
                yield
            finally:
                for block in self.opened:
                    block.reshard()

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The graph's answer to tensors."""
        with self.around_parts():
            return self.gm(*tensors)

    def read(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the guards read out of tensors."""
        assert self.guards is not None
        with self.around(), torch.no_grad():
            return self.guards.gm(*tensors)


def sharded_owners(program: Program) -> tuple[Any, ...]:
    """The modules of which only parts are called, where weights are in shards (`fully_shard`).

    Such a module has the weights of its parts only while it runs itself. What the model has of its
    own it has in each of its calls.
    """
    calls = [str(n.target).removeprefix("model.") for n in program.graph.nodes if _is_call(n)]
    owners = [o for name in calls if (o := _sharded(program.model, name)) not in ("", name)]
    return tuple(map(program.model.get_submodule, dict.fromkeys(owners)))


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def _sharded(model: nn.Module, name: str) -> str:
    """The path of the innermost module, from `name` up, that can gather its weights."""
    while name and not hasattr(model.get_submodule(name), "unshard"):
        name = name.rpartition(".")[0]
    return name


def accepts(subject: Subject, captured: Captured, call: FlatCall) -> Shapes | None:
    """The guard shapes of a call (whose signature is the capture's) that the graph is right for.

    None where it is not. Where a masked selection has another size than any seen, the graph is
    checked with it first.
    """
    guards, newest = captured.guards, captured.newest
    if guards is None:
        return ()
    tensors = TensorIdentity([call.tensors[i] for i in guards.inputs])
    if newest is not None and not tensors.other_objects(newest[0]):
        return newest[1]
    read = captured.read(call.tensors)
    if not every(captured.ranks, guards.values(read) == guards.values(guards.expected)):
        _log_failed(guards, read)
        return None
    shapes = guards.shapes(read)
    if not every(captured.ranks, shapes in captured.accepted):
        difference = _differs(subject, captured, call, call.tensors)
        if not every(captured.ranks, difference is None):
            log.info("a graph is not for this call: with %s %s", shapes, difference)
            return None
        captured.accepted.add(shapes)
    captured.newest = tensors, shapes
    return shapes


def _log_failed(guards: Guards, read: Sequence[Any]) -> None:
    if log.isEnabledFor(logging.INFO):
        texts, wanted = guards.described(read), guards.expected
        failed = [
            f"{text} (captured with {short(want)})"
            for text, want, value in zip(texts, wanted, read, strict=True)
            if want != value and not isinstance(value, torch.Size)
        ]
        log.info("a graph is not for this call: it reads %s", "; ".join(failed))


def can_replay(captured: Captured) -> bool:
    """Whether the recording holds all that is read of blocks: run values, never cached blocks."""
    program = captured.program
    read = {name for region in program.regions for name in region.values}
    read |= {value.name for call in program.block_calls() for value in block_values(call)}
    return not read & captured.not_held


@contextmanager
def replayed(captured: Captured) -> Iterator[None]:
    """Within the context the blocks return what they returned in the recorded run."""
    calls: dict[str, Iterator[ModuleCall]] = {
        name: iter([c for c in captured.recording.calls if c.name == name])
        for name in captured.blocks.values()
    }

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        made = next(calls[name])
        return unflatten(made.skeleton, made.outputs())

    with intercepted(captured.blocks, handle):
        yield


def not_held(program: Program, recording: Recording) -> frozenset[str]:
    """The names of block results whose values the recording does not hold."""
    calls: dict[str, Iterator[ModuleCall]] = {}
    missing: list[str] = []
    for node in program.block_calls():
        name = str(node.target).removeprefix("model.")
        if name not in calls:
            calls[name] = iter([c for c in recording.calls if c.name == name])
        made = next(calls[name])
        missing += [v.name for v in block_values(node) if meta_of(v).output not in made.values]
    return frozenset(missing)


def _differs(
    subject: Subject, captured: Captured, call: FlatCall, tensors: Sequence[torch.Tensor]
) -> str | None:
    with subject.turns.of_model(), unnoticed(subject.model):
        return compare(
            lambda: subject.run(call, tensors),
            lambda: captured.run(tensors),
            captured.blocks,
            captured.recording,
        )
