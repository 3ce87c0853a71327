"""A captured graph: the calls that it is valid for, and its first run without its blocks."""

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
from dit_cache_fx.capture.recording import Recording
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.capture.settings import applied
from dit_cache_fx.capture.side_effects import unnoticed
from dit_cache_fx.capture.signature import CallSignature, FlatCall, unflatten_call
from dit_cache_fx.capture.turns import Turns
from dit_cache_fx.ir.graph_text import short
from dit_cache_fx.ir.node_meta import BlockId, meta_of
from dit_cache_fx.ir.nodes import block_values, module_name
from dit_cache_fx.ir.program import Program
from dit_cache_fx.ranks import Ranks, every
from dit_cache_fx.strategies import Strategy, never_cached
from dit_cache_fx.strategies.signals import value_of
from dit_cache_fx.values.identity import TensorIdentity
from dit_cache_fx.values.pytree import unflatten


@dataclass(frozen=True)
class Subject:
    """A model to capture: how it is called, and the lists that may hold its blocks."""

    model: nn.Module
    signature: CallSignature
    blocks: tuple[str, ...] | None  # the names of the block lists if the user passed them
    strategy: Strategy
    check: bool = True
    turns: Turns = field(default_factory=Turns)  # for threads that use its modules

    def lists(self) -> list[BlockList]:
        """Return the lists that may hold the trunk, as they are now."""
        if self.blocks is None:
            return candidate_lists(self.model)
        return [named_list(self.model, name) for name in self.blocks]

    def always_runs(self, name: str) -> bool:
        """Return whether the block of this name may be one that is never cached.

        Before the trunk is known an alias ("double_blocks") can mean any of the lists, and any of
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
        """Return the blocks whose parts are recorded, to find the strategy's signal there."""
        wanted = value_of(self.strategy) == "modulated"
        return [blocks.modules[0] for blocks in lists] if wanted else []

    def run(self, call: FlatCall, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the model on a flattened call with these tensors."""
        return self.answer(call, unflatten_call(call.skeleton, list(tensors)))

    def answer(self, call: FlatCall, arguments: dict[str, Any]) -> Any:
        """Run the model on named arguments."""
        with nullcontext() if call.number is None else NumberFactories(call.number):
            return self.signature.call(own_forward(self.model), arguments)


log = logging.getLogger(__name__)

#: the errors of a graph on tensors of other sizes than those that it has as numbers
_OTHER_SIZES = (RuntimeError, IndexError)

#: the sizes of masked selections, which may differ between calls
Shapes = tuple[torch.Size, ...]


@dataclass
class Captured:
    """A checked program, with everything that is needed to validate it on the next call."""

    program: Program
    gm: fx.GraphModule  # the graph as captured; each pass makes another one
    guards: Guards | None
    recording: Recording  # of the call that it was captured from, until that call is answered
    blocks: dict[nn.Module, str]
    whole: set[nn.Module]  # every module that the graph calls
    accepted: set[Shapes]  # guard shapes that the graph was checked with
    turns: Turns  # for threads that run the model's graphs
    not_recorded: frozenset[str] = frozenset()  # block results that were not recorded
    #: the tensors that the guards of the newest call depend on, and its guard shapes
    newest: tuple[TensorIdentity, Shapes] | None = None
    unread: Sequence[str] = ()  # attributes that forward sets for other code, in words
    spread: bool = False  # some of its tensors are distributed
    ranks: Ranks | None = None  # the processes that run the model
    asked: Ranks | None = None  # those of them that may read other values here
    opened: tuple[Any, ...] = ()  # blocks with parts in the graph and sharded weights

    def around(self) -> AbstractContextManager[None]:
        """Enter the state that the graphs need: no autocast, the attributes that forward sets.

        Threads share the modules: while attributes are set there, no other graph runs.
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
        """Like `around`, for parts of blocks, whose weights exist only while the block runs."""
        with self.around():
            try:
                for block in self.opened:
                    block.unshard()
                yield
            finally:
                for block in self.opened:
                    block.reshard()

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the graph on tensors."""
        with self.around_parts():
            return self.gm(*tensors)

    def read(self, tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Return the values that the guards read."""
        assert self.guards is not None
        with self.around(), torch.no_grad():
            read: Sequence[Any] = self.guards.gm(*tensors)
        return read


def sharded_owners(program: Program) -> tuple[Any, ...]:
    """Return the modules with sharded weights (`fully_shard`) of which only parts are called.

    Such a module has the weights of its parts only while it runs. The model's own weights exist in
    each of its calls.
    """
    called = map(module_name, program.graph.find_nodes(op="call_module"))
    owners = [o for name in called if (o := _sharded(program.model, name)) not in ("", name)]
    return tuple(map(program.model.get_submodule, dict.fromkeys(owners)))


def _sharded(model: nn.Module, name: str) -> str:
    """Return the path of the innermost module, from `name` up, that can gather its weights."""
    while name and not hasattr(model.get_submodule(name), "unshard"):
        name = name.rpartition(".")[0]
    return name


def accepts(subject: Subject, captured: Captured, call: FlatCall) -> Shapes | None:
    """Return the guard shapes of a call with the capture's signature if the graph is valid for it.

    None if it is not. If a masked selection has a new size, the graph is checked with it first.
    """
    guards, newest = captured.guards, captured.newest
    if guards is None:
        return ()
    tensors = TensorIdentity([call.tensors[i] for i in guards.inputs])
    known = newest is not None and not tensors.other_objects(newest[0])
    if newest is not None and every(captured.asked, known):
        return newest[1]
    read = _read(captured, call)
    if not every(captured.ranks, read is not None and guards.hold(read)):
        _log_failed(guards, read)
        return None
    shapes = guards.shapes(read or ())
    if not every(captured.ranks, shapes in captured.accepted):
        difference = _differs(subject, captured, call, call.tensors)
        if not every(captured.ranks, difference is None):
            log.info("a graph is not valid for this call: with %s %s", shapes, difference)
            return None
        captured.accepted.add(shapes)
    captured.newest = tensors, shapes
    return shapes


def _read(captured: Captured, call: FlatCall) -> Sequence[Any] | None:
    """Return the values that the guards read; None if their graph cannot take the call's sizes."""
    try:
        return captured.read(call.tensors)
    except _OTHER_SIZES as error:
        log.info("the guards of a graph cannot read this call: %s", error)
        return None


def _log_failed(guards: Guards, read: Sequence[Any] | None) -> None:
    if read is not None and log.isEnabledFor(logging.INFO):
        texts, wanted = guards.described(read), guards.expected
        failed = [
            f"{text} (captured with {short(want)})"
            for text, want, value in zip(texts, wanted, read, strict=True)
            if want != value and not isinstance(value, torch.Size)
        ]
        log.info("a graph is not valid for this call: it reads %s", "; ".join(failed))


def can_replay(captured: Captured) -> bool:
    """Return whether the recording holds all results that are read: run values, uncached blocks."""
    program = captured.program
    read = {name for region in program.regions for name in region.values}
    read |= {value.name for call in program.block_calls() for value in block_values(call)}
    return not read & captured.not_recorded


@contextmanager
def replayed(captured: Captured) -> Iterator[None]:
    """Let the blocks return the results of the recorded run."""
    calls = captured.recording.of_each(captured.blocks.values())

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        made = next(calls[name])
        return unflatten(made.skeleton, made.outputs())

    with intercepted(captured.blocks, handle):
        yield


def not_recorded(program: Program, recording: Recording) -> frozenset[str]:
    """Return the names of block results whose values the recording does not hold."""
    calls = recording.of_each(map(module_name, program.block_calls()))
    missing: list[str] = []
    for node in program.block_calls():
        made = next(calls[module_name(node)])
        missing += [v.name for v in block_values(node) if meta_of(v).output not in made.values]
    return frozenset(missing)


def _differs(
    subject: Subject, captured: Captured, call: FlatCall, tensors: Sequence[torch.Tensor]
) -> str | None:
    with subject.turns.of_model(), unnoticed(subject.model):
        try:
            return compare(
                lambda: subject.run(call, tensors),
                lambda: captured.run(tensors),
                captured.blocks,
                captured.recording,
            )
        except _OTHER_SIZES as error:  # if it is the model's, a new capture raises it again
            return f"it raises {type(error).__name__}: {error}"
