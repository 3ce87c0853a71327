"""Run the graphs of a call between the host's bookkeeping.

An engine's call is a generator: it yields a graph to run, receives the results, and finally returns
the call's output. `drive` runs those graphs, and nothing else.

Under `torch.compile`, Dynamo must see the graphs alone. They are functions of tensors, the same on
every step, and are compiled once. The bookkeeping between them is Python code with values that
change on every step: the step's number, the branches, the cached tensors, locks. Dynamo would break
the graph there, or take such values for constants and compile again for each step. So the host's
part is hidden from it, and so is the loop of `drive`, as a sampler's loop is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dit_cache_fx._torch import (
    dynamo_callback,
    frame_is_compiled,
    look_again,
    not_a_compiled_frame,
    unseen,
    wants_one_graph,
)

Results = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Compiler:
    """The compiler of the graphs that run: `torch.compile`, by its callback, or None."""

    callback: Hashable = None

    @property
    def looks_on(self) -> bool:
        return self.callback is not None

    @property
    def fullgraph(self) -> bool:
        """Return whether it is `torch.compile(fullgraph=True)`."""
        return wants_one_graph(self.callback)


#: graphs run without a compiler
NOTHING = Compiler()


def lasting(results: Results) -> list[torch.Tensor]:
    """Return copies of tensors that the next replay of a CUDA graph would overwrite."""
    return [t.clone() if t.is_cuda else t for t in results]


class GraphCall(NamedTuple):
    """A graph to run, its operands, and the context to run it in."""

    graph: Callable[..., Results]
    operands: Sequence[torch.Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


#: yields graphs to run, receives their results, and returns the call's output
Serving = Generator[GraphCall, Results, Any]


class Turn(NamedTuple):
    """The state of an engine's call: the next graph, or None with the call's output.

    `within`: the graph's context, which is entered.
    """

    graph_call: GraphCall | None
    output: Any = None
    within: AbstractContextManager[Any] | None = None


@not_a_compiled_frame
def drive(serving: Serving) -> Any:
    """Return the output of an engine's call; the active compiler, if any, runs its graphs."""
    callback = dynamo_callback()
    resumed = unseen(_resumed) if callback else _resumed
    turn = resumed(serving.send, None, None)
    while turn.graph_call is not None:
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                results = turn.graph_call.graph(*turn.graph_call.operands)
        except BaseException as error:  # the engine may run another graph, or raise it
            look_again(callback)
            turn = resumed(serving.throw, error, turn.within)
        else:
            turn = resumed(serving.send, results, turn.within)
    if wants_one_graph(callback):
        frame_is_compiled()
    return turn.output


def _resumed(
    resume: Callable[[Any], GraphCall], value: Any, within: AbstractContextManager[Any] | None
) -> Turn:
    """Run the host's part of a call: leave a graph's context, and enter the next one's."""
    if within is not None:
        within.__exit__(None, None, None)
    try:
        graph_call = resume(value)
    except StopIteration as end:
        return Turn(None, end.value)
    within = graph_call.around()
    within.__enter__()
    return Turn(graph_call, None, within)
