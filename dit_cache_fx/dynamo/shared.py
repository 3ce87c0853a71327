"""State that all graphs of one backend share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from dit_cache_fx._torch import Piece
from dit_cache_fx.dynamo.capture import Input, Outlined
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.ranks import Ranks
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue

NO_BLOCKS = (
    "no block list found in the compiled graph (an nn.ModuleList whose members are called one "
    "after another)"
)
_SPLIT = (
    "Dynamo splits the model (TORCH_LOGS=graph_breaks shows where) and no piece can be cached, "
    "but dit_cache_fx.apply(model, ...) can capture it"
)

Compiled = Callable[..., Sequence[Any]]


@dataclass
class Shared:
    """The shared state of a backend's graphs.

    `timesteps`: by the function that Dynamo has split, the timestep of its first piece. `split`:
    there was a piece that is not the whole of its function. `caches`: a graph is cached.
    `programs`: those of the existing graphs. `ranks`: the processes that run the model.
    """

    call_log: CallLog
    enabled: bool = True
    serials: dict[Hashable, int] = field(default_factory=dict)  # of programs
    timesteps: dict[Hashable, TimestepValue] = field(default_factory=dict)
    programs: WeakSet[Lowered] = field(default_factory=WeakSet)
    split: bool = False
    caches: bool = False
    warned: bool = False
    first_constant: float | None = None
    ranks: Ranks | None = None

    def serial(self, program: Hashable) -> int:
        """Return the number of a program: graphs of one program share their cached tensors.

        Threads that wait for one compilation of Dynamo get a graph each.
        """
        return self.serials.setdefault(program, len(self.serials) + 1)

    def tell(self, piece: Piece, value: TimestepValue) -> None:
        """Record the timestep of a piece for the later ones."""
        if not piece.whole:
            self.timesteps[piece.function] = value

    def constant(self, value: float | None) -> float | None:
        """Return the timestep that is a constant of a graph; None for any other than the first one.

        Dynamo lets a number vary from its second value on. If it cannot, each step has a graph of
        its own, and nothing can be reused.
        """
        if self.first_constant is None:
            self.first_constant = value
        return value if value == self.first_constant else None

    def uncached(self, reason: str, again: bool) -> None:
        """Warn, once, that a graph is not cached. For a split model only if no piece is cached.

        That is known when a graph is called `again`: by then all pieces are compiled.
        """
        if self.warned or (self.split and (self.caches or not again)):
            return
        self.warned = True
        self.call_log.warn_once(f"{_SPLIT}; {reason}" if self.split else reason)


def step_value(
    shared: Shared,
    outlined: Outlined,
    piece: Piece,
    inputs: Sequence[Input],
    session: Session | None = None,
) -> TimestepValue | None:
    """Return a call's timestep: set by the user, among its inputs, or from an earlier piece."""
    place = outlined.timestep_position
    value: TimestepValue | None = None
    explicit = (session or shared.call_log.tracker.session).explicit
    if not piece.first:
        value = shared.timesteps.get(piece.function)
    if explicit is not None:
        value = float(explicit)
    elif value is None and place is not None:
        value = shared.call_log.read(inputs[place])  # type: ignore[arg-type]
    elif value is None:
        value = shared.constant(outlined.constant)
    if value is not None and piece.first:
        shared.tell(piece, value)
    return value
