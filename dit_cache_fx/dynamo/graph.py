"""One graph that Dynamo has captured, cached."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_cache_fx._torch import Piece
from dit_cache_fx.dynamo.capture import Input, Outlined, capture_graph
from dit_cache_fx.dynamo.inner import Compile
from dit_cache_fx.dynamo.parts import compiled_part, flat
from dit_cache_fx.dynamo.rows import RowAnswers
from dit_cache_fx.errors import CaptureError, DiscoveryError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.program import operations, tensor_spec
from dit_cache_fx.lowering import Part, Variants, lower_variants
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.passes import run_passes
from dit_cache_fx.ranks import Ranks
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.drive import lasting
from dit_cache_fx.runtime.generation import TimestepValue, timestep_value
from dit_cache_fx.runtime.graphs import block_bytes
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.strategies import check_block_ids, spread_over
from dit_cache_fx.strategies.calibrated import check_graph
from dit_cache_fx.values.pytree import Identity, unflatten
from dit_cache_fx.values.wrapped import is_distributed

#: most shapes of one graph with dynamic shapes whose variants are kept
MAX_SHAPES = 32

_NO_TIMESTEP = (
    "the timestep is no tensor input of the compiled graph. Pass it as a tensor (a number is a "
    "constant there), name it (timestep='...'), or set cur_timestep"
)

log = logging.getLogger(__name__)

NO_BLOCKS = (
    "no block list found in the compiled graph (an nn.ModuleList whose members are called one "
    "after another)"
)
_SPLIT = (
    "Dynamo splits the model (TORCH_LOGS=graph_breaks tells where) and no piece can be cached, but "
    "dit_cache_fx.apply(model, ...) can capture it"
)

_DISTRIBUTED = (
    "the call has distributed tensors (DTensor), and a backend makes none; use "
    "dit_cache_fx.apply(model, ...), then torch.compile or compile_steps()"
)
_SPLIT_BATCH = (
    "Dynamo splits the model (TORCH_LOGS=graph_breaks tells where), and a batch of sessions needs "
    "it in one graph: dit_cache_fx.apply(model, ...) can capture it, or call each session by itself"
)

Compiled = Callable[..., Sequence[Any]]


@dataclass
class Shared:
    """What all graphs of one backend have in common.

    `timesteps`: by the function that Dynamo has split, the timestep that its first piece was given.
    `split`: there was a piece that is not the whole of its function. `caches`: a graph is cached.
    `ranks`: the processes that the model is spread over.
    """

    call_log: CallLog
    enabled: bool = True
    serials: dict[Hashable, int] = field(default_factory=dict)  # of programs
    timesteps: dict[Hashable, TimestepValue] = field(default_factory=dict)
    split: bool = False
    caches: bool = False
    warned: bool = False
    first_constant: float | None = None
    ranks: Ranks | None = None

    def serial(self, program: Hashable) -> int:
        """The number of a program: what is held with one graph of it is right for another one.

        Threads that wait for one compilation of Dynamo get a graph each.
        """
        return self.serials.setdefault(program, len(self.serials) + 1)

    def tell(self, piece: Piece, value: TimestepValue) -> None:
        """Note the timestep of a piece for those behind it."""
        if not piece.whole:
            self.timesteps[piece.function] = value

    def constant(self, value: float | None) -> float | None:
        """A timestep that is a constant of a graph; None for any other than the first one.

        Dynamo lets a number vary from its second value on. Where it must not, each step has a
        graph of its own, and there is nothing to reuse.
        """
        if self.first_constant is None:
            self.first_constant = value
        return value if value == self.first_constant else None

    def uncached(self, reason: str, again: bool) -> None:
        """A graph is not cached: warn, once. Of a split model only where no piece is cached.

        That is known when a graph is called `again`: by then all pieces were compiled.
        """
        if self.warned or (self.split and (self.caches or not again)):
            return
        self.warned = True
        self.call_log.warn_once(f"{_SPLIT}; {reason}" if self.split else reason)


class CachedGraph:
    """Answers the calls of one of Dynamo's graphs: a model, or a piece of one."""

    def __init__(
        self, shared: Shared, compile_graph: Compile, outlined: Outlined, piece: Piece
    ) -> None:
        self._shared = shared
        self._compile = compile_graph
        self._outlined = outlined
        self._piece = piece
        self._entries: OrderedDict[Hashable, Lowered | None] = OrderedDict()
        self._plain: OrderedDict[Hashable, Compiled] = OrderedDict()
        self._making = threading.RLock()  # of entries and plain graphs, each is made once
        self._rows = RowAnswers(shared.call_log, outlined, self._lower)
        self._reason = ""  # why it is not cached
        self._called = False

    def __call__(self, *given: Input) -> Sequence[Any]:
        inputs = [*given]
        for i in self._outlined.numbers:
            inputs[i] = _number(inputs[i])
        step = self._outlined.number_step
        if step is not None:
            inputs[step] = torch.as_tensor(inputs[step])
        batch = self._shared.call_log.tracker.batch
        if batch is not None and self._shared.enabled:
            return self._serve_rows(batch, inputs)
        key = self._key(inputs)
        value = self._value(inputs) if self._shared.enabled else None
        lowered = None if value is None else self._lowered(key, inputs)
        if value is None or lowered is None:
            return self._uncached(key, inputs)
        tensors = [inputs[i] for i in self._outlined.tensors]
        return self._serve(lowered, value, tensors)  # type: ignore[arg-type]

    def lowered(self) -> list[Lowered]:
        """The graphs that there are."""
        found = [entry for entry in [*self._entries.values()] if entry is not None]
        return found + self._rows.lowered()

    def forget(self) -> None:
        """Forget them."""
        self._entries.clear()
        self._rows.forget()

    # --- a call ------------------------------------------------------------------------------

    def _key(self, inputs: Sequence[Input]) -> Hashable:
        """What the graphs are made for. Without dynamic shapes Dynamo sees that it is the same."""
        if not self._outlined.dynamic:
            return ()
        given = [inputs[i] for i in self._outlined.given]
        return tuple(
            (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else v
            for v in given
        )

    def _value(
        self, inputs: Sequence[Input], session: Session | None = None
    ) -> TimestepValue | None:
        """The step's timestep: set by the user, among the inputs, or told by an earlier piece."""
        position = self._outlined.timestep_position
        value: TimestepValue | None = None
        explicit = (session or self._shared.call_log.tracker.session).explicit
        if not self._piece.first:
            value = self._shared.timesteps.get(self._piece.function)
        if explicit is not None:
            value = float(explicit)
        elif value is None and position is not None:
            value = timestep_value(inputs[position])  # type: ignore[arg-type]
        elif value is None:
            value = self._shared.constant(self._outlined.constant)
        if value is None:
            self._missed(_NO_TIMESTEP)
        elif self._piece.first:
            self._shared.tell(self._piece, value)
        return value

    def _serve(
        self, lowered: Lowered, value: TimestepValue, tensors: Sequence[torch.Tensor]
    ) -> Sequence[Any]:
        call_log, variants = self._shared.call_log, lowered.variants
        session = call_log.tracker.session
        given = [tensors[i] for i in lowered.given]
        with session.lock, torch.no_grad():
            derived = not self._piece.first
            evidence = call_log.evidence(
                session, lowered, lowered.signature, value, tensors, derived
            )
            start = call_log.begin(session, evidence, lowered)
            results = _run(lowered, start.step, tensors)
            outputs = lasting(results[: variants.outputs])
            recorded = lasting([t.contiguous() for t in results[variants.outputs :]])
            owned = start.step.commit(given, outputs, recorded)
            arguments = lowered.program.arguments
            call_log.done(start, lambda: [arguments[i] for i in lowered.conditioning])
        output: Sequence[Any] = unflatten(lowered.program.output, owned)
        return output

    def _serve_rows(self, batch: Batch, inputs: Sequence[Input]) -> Sequence[Any]:
        """Answer a call whose rows belong to different sessions."""
        if not self._piece.whole:
            raise CaptureError(_SPLIT_BATCH)

        def value(session: Session, given: Sequence[Input]) -> TimestepValue:
            found = self._value(given, session)
            if found is None:
                raise CaptureError(_NO_TIMESTEP)
            return found

        return self._rows(batch, inputs, self._key, value)

    def _uncached(self, key: Hashable, inputs: Sequence[Input]) -> Sequence[Any]:
        outlined = self._outlined
        if outlined.number_step is not None:
            inputs = [_number(v) if i == outlined.number_step else v for i, v in enumerate(inputs)]
            key = key, inputs[outlined.number_step]
        compiled = self._plain.get(key)
        if compiled is None:
            compiled = self._compiled_plain(key, inputs)
        return compiled(*inputs)

    def _compiled_plain(self, key: Hashable, inputs: Sequence[Input]) -> Compiled:
        with self._making:
            if key not in self._plain:
                outlined = self._outlined
                numbers = outlined.numbers or outlined.number_step is not None
                gm = flat(outlined.gm) if numbers else outlined.dynamos
                self._plain[key] = self._compile(gm, inputs)
                _drop_oldest(self._plain)
            return self._plain[key]

    # --- a capture ---------------------------------------------------------------------------

    def _lowered(self, key: Hashable, inputs: Sequence[Input]) -> Lowered | None:
        """The graphs for inputs like these; None where they cannot be made."""
        entry = self._entries.get(key) or self._made(key, inputs)
        if entry is None:
            self._missed(self._reason)
        return entry

    def _made(self, key: Hashable, inputs: Sequence[Input]) -> Lowered | None:
        with self._making:
            if key not in self._entries:
                try:
                    self._entries[key] = self._lower(inputs)
                    self._shared.caches = True
                except (CaptureError, DiscoveryError) as error:
                    self._entries[key] = None
                    self._reason = str(error)
                _drop_oldest(self._entries)
            return self._entries[key]

    def _missed(self, reason: str) -> None:
        self._shared.uncached(reason, self._called)
        self._called = True

    def _lower(self, inputs: Sequence[Input], alone: Alone | None = None) -> Lowered:
        strategy, outlined = self._shared.call_log.strategy, self._outlined
        strategy = spread_over(strategy, self._shared.ranks)
        given = [inputs[i] for i in outlined.given]
        if any(isinstance(v, torch.Tensor) and is_distributed(v) for v in given):
            raise CaptureError(_DISTRIBUTED)
        traced = capture_graph(outlined, inputs, strategy)
        program = traced.program
        lists = {**program.block_lists, **outlined.elsewhere}
        check_block_ids(strategy, lists)
        owned = [program.node(name) for name in sorted(program.owned) if self._piece.whole]
        check_graph(strategy, lists, [tensor_spec(node).shape for node in owned])
        nodes = operations(program.graph)
        program.alone = alone
        run_passes(program, strategy)
        variants = lower_variants(program)
        origins = dict(zip(program.inputs, outlined.origins, strict=True))

        def compiled(part: Part) -> Part:
            return compiled_part(part, self._compile, variants.held, outlined.dynamos, origins)

        ready = variants.mapped(compiled)
        entry = Lowered(
            program,
            ready,
            nodes,
            block_bytes(traced.recording, traced.blocks),
            self._shared.serial(_identity(ready)),
            strategy,
        )
        log.info("captured %s", entry)
        return entry


class NotingGraph:
    """A piece without blocks that is given the timestep: it tells the pieces behind it."""

    def __init__(self, shared: Shared, compiled: Compiled, position: int, piece: Piece) -> None:
        self._shared = shared
        self._compiled = compiled
        self._position = position
        self._piece = piece
        self._called = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._shared.enabled:
            if self._shared.call_log.tracker.session.explicit is None:
                self._shared.tell(self._piece, timestep_value(inputs[self._position]))
            self._shared.uncached(NO_BLOCKS, self._called)
            self._called = True
        return self._compiled(*inputs)


def _run(lowered: Lowered, step: Step, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Run the graph of the step's kind; what it reads of the inputs is picked by name."""
    variants, made = lowered.variants, dict[str, torch.Tensor]()
    value: torch.Tensor | None = None
    if variants.prefix is not None:
        value, *carried = _call(lowered, variants.prefix, tensors, made)
        made.update(zip(variants.carried, carried, strict=True))
        value = lasting([value])[0]
    step.decide(value)
    part = variants.compute if step.computes else variants.reuse
    made.update(step.compiled_given(part.names))
    return _call(lowered, part, tensors, made)


def _call(
    lowered: Lowered,
    part: Part,
    tensors: Sequence[torch.Tensor],
    made: Mapping[str, torch.Tensor],
) -> Sequence[torch.Tensor]:
    places = lowered.places
    return part.run(*(tensors[places[n]] if n in places else made[n] for n in part.names))


def _number(value: Input) -> int | float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _identity(variants: Variants) -> Hashable:
    """What tells programs apart: the code of their graphs, the constants in it, what is held."""
    parts = [p for p in (variants.prefix, variants.compute, variants.reuse) if p is not None]
    code = tuple(part.gm.code for part in parts)
    constants = tuple(
        Identity(getattr(part.gm, str(node.target)))
        for part in parts
        for node in part.gm.graph.find_nodes(op="get_attr")
    )
    return code, constants, tuple(variants.held.items())


def _drop_oldest(kept: OrderedDict[Hashable, Any]) -> None:
    while len(kept) > MAX_SHAPES:
        kept.popitem(last=False)
