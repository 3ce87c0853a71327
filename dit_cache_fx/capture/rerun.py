"""The blocks of a new graph run once more, in the graph, for the call that it was captured from.

What a module-level variable, or a context that nobody knows of, does to the blocks while the
model's forward is in charge is seen in this way alone: by then forward has been left, and what it
has changed is put back. So a block that depends on it gives something else, or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dit_cache_fx.capture.captured import Captured
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.recording import RecordedCall
from dit_cache_fx.capture.samples import other_block
from dit_cache_fx.capture.side_effects import unnoticed
from dit_cache_fx.errors import DitCacheError
from dit_cache_fx.values.checksum import Checksums, checksum, equal
from dit_cache_fx.values.pytree import flatten


class Rerun:
    """What the blocks have given in a graph, beside what they gave in the recorded run."""

    def __init__(self) -> None:
        self.running = ""
        self.pairs: list[tuple[str, Checksums, Checksums]] = []

    def given(self, made: RecordedCall, outputs: list[torch.Tensor]) -> None:
        self.pairs.append((made.name, made.digests, [checksum(t) for t in outputs]))

    def differing(self) -> str | None:
        """The first block that gave something else."""
        return next((name for name, want, got in self.pairs if not equal(want, got)), None)

    def repeats(self, other: Rerun) -> bool:
        """Whether the blocks gave the same in two runs of the graph."""
        mine, others = ([got for _, _, got in rerun.pairs] for rerun in (self, other))
        return len(mine) == len(others) and all(map(equal, mine, others))


@contextmanager
def rerunning(model: nn.Module, captured: Captured) -> Iterator[Rerun]:
    """Within it a graph may run its blocks once: it finds what the recorded run has found.

    Attributes are put back afterwards, and random numbers are drawn again.
    """
    rerun = Rerun()
    recording = captured.recording
    calls = recording.of_each(captured.blocks.values())

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        made = next(calls[name])
        rerun.running = name
        with nullcontext() if made.random is None else made.random.again():
            output = call(module, *args, **kwargs)
        rerun.given(made, flatten(output)[0])
        return output

    world = nullcontext() if recording.world is None else recording.world.as_before()
    with unnoticed(model, recording.before), world, intercepted(captured.blocks, handle):
        try:
            yield rerun
        except (DitCacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise other_block(rerun.running) from error
