"""The frame between the host's bookkeeping and the graphs that run.

An engine's call is a generator: it asks for a graph to be run, gets the results, and in the end
returns the call's output. `drive` runs those graphs, and nothing else.

Where `torch.compile` looks on, it must see the graphs alone. They are functions of tensors, the
same on every step, and are compiled once. The bookkeeping between them is Python that is another
one on every step: the step's number, the branches, what is held, locks. Dynamo would break the
graph there, or take such values for constants and compile again for each step. So the host's part
is hidden from it, and so is the loop of `drive`, as a sampler's loop is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dit_cache_fx._torch import (
    dynamo_callback,
    look_again,
    not_a_compiled_frame,
    unseen,
    wants_one_graph,
)

Results = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Compiler:
    """What looks on where graphs run: `torch.compile`, by its callback, or nothing (None)."""

    callback: Hashable = None

    @property
    def looks_on(self) -> bool:
        return self.callback is not None

    @property
    def fullgraph(self) -> bool:
        """Whether it is `torch.compile(fullgraph=True)`."""
        return wants_one_graph(self.callback)


#: no compiler looks on
NOTHING = Compiler()


def lasting(results: Results) -> list[torch.Tensor]:
    """The values in memory that the next replay of a CUDA graph does not overwrite."""
    return [t.clone() if t.is_cuda else t for t in results]


class GraphCall(NamedTuple):
    """A graph to run, what with, and within which context."""

    graph: Callable[..., Results]
    operands: Sequence[torch.Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


#: asks for graphs to be run, gets their results, and returns the call's output
Serving = Generator[GraphCall, Results, Any]


class Turn(NamedTuple):
    """Where an engine's call stands: the graph that it asks for; None with the call's output.

    `within`: the graph's context, which is entered.
    """

    graph_call: GraphCall | None
    output: Any = None
    within: AbstractContextManager[Any] | None = None


@not_a_compiled_frame
def drive(serving: Serving) -> Any:
    """The output of an engine's call, its graphs run by whatever compiler looks on."""
    callback = dynamo_callback()
    resumed = unseen(_resumed) if callback else _resumed
    turn = resumed(serving.send, None, None)
    while turn.graph_call is not None:
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                results = turn.graph_call.graph(*turn.graph_call.operands)
        except BaseException as error:  # the engine may ask for another graph, or let it go on
            look_again(callback)
            turn = resumed(serving.throw, error, turn.within)
        else:
            turn = resumed(serving.send, results, turn.within)
    return turn.output


def _resumed(
    resume: Callable[[Any], GraphCall], value: Any, within: AbstractContextManager[Any] | None
) -> Turn:
    """The host's part of a call: out of one graph's context, up to and into the next one's."""
    if within is not None:
        within.__exit__(None, None, None)
    try:
        graph_call = resume(value)
    except StopIteration as end:
        return Turn(None, end.value)
    within = graph_call.around()
    within.__enter__()
    return Turn(graph_call, None, within)
