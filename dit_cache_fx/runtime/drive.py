"""The frame between the host's bookkeeping and the graphs that run.

An engine's call is a generator: it asks for a graph to be run, gets the results, and in the end
returns the call's output. `drive` runs those graphs, and nothing else. So where `torch.compile`
looks on, it sees the graphs alone: the bookkeeping is the host's, as a sampler's loop is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from dit_cache_fx._torch import not_a_compiled_frame

Results = Sequence[torch.Tensor]


class Compiler(Enum):
    """What looks on where graphs run: nothing, `torch.compile`, or that with `fullgraph=True`."""

    NONE = 0
    ANY = 1
    FULLGRAPH = 2


def lasting(results: Results) -> list[torch.Tensor]:
    """The values in memory that the next replay of a CUDA graph does not overwrite."""
    return [t.clone() if t.is_cuda else t for t in results]


@dataclass(frozen=True)
class Stage:
    """A graph to run, what with, and within which context."""

    graph: Callable[..., Results]
    operands: Sequence[torch.Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


#: asks for graphs to be run, gets their results, and returns the call's output
Serving = Generator[Stage, Results, Any]


class _Host:
    """Runs an engine's generator, out of sight of `torch.compile`."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.stage: Stage | None = None
        self.output: Any = None
        self._around = ExitStack()

    @torch.compiler.disable
    def start(self) -> None:
        self._resume(lambda: next(self.serving))

    @torch.compiler.disable
    def take(self, results: Results) -> None:
        self._resume(lambda: self.serving.send(results))

    @torch.compiler.disable
    def fail(self, error: BaseException) -> None:
        """The stage raised: the engine may ask for another one, or the error goes on."""
        self._resume(lambda: self.serving.throw(error))

    def _resume(self, resume: Callable[[], Stage]) -> None:
        self._around.close()
        try:
            self.stage = resume()
            self._around.enter_context(self.stage.around())
        except StopIteration as end:
            self.stage, self.output = None, end.value


@not_a_compiled_frame
def drive(serving: Serving) -> Any:
    """The output of an engine's call, its graphs run by whatever compiler looks on."""
    host = _Host(serving)
    host.start()
    while host.stage is not None:
        try:
            with torch.no_grad():
                results = host.stage.graph(*host.stage.operands)
        except BaseException as error:
            host.fail(error)
        else:
            host.take(results)
    return host.output


def drive_here(serving: Serving) -> Any:
    """The same on the host, where no compiler is to look on."""
    try:
        stage = next(serving)
        while True:
            try:
                with torch.no_grad(), stage.around():
                    results = stage.graph(*stage.operands)
            except BaseException as error:
                stage = serving.throw(error)
            else:
                stage = serving.send(results)
    except StopIteration as end:
        return end.value
