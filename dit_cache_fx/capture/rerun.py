"""Run the blocks of a new graph a second time, in the graph, for the call of its capture.

This detects effects on blocks that are visible in no other way: of module-level variables, or of
contexts that the capture does not know. At that point forward has returned and its changes are
undone, so a block that depends on them gives another result, or fails.
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
    """The results of the blocks in a graph, compared with those of the recorded run."""

    def __init__(self) -> None:
        self.running = ""
        self.pairs: list[tuple[str, Checksums, Checksums]] = []

    def given(self, made: RecordedCall, outputs: list[torch.Tensor]) -> None:
        self.pairs.append((made.name, made.digests, [checksum(t) for t in outputs]))

    def differing(self) -> str | None:
        """Return the first block with another result."""
        return next((name for name, want, got in self.pairs if not equal(want, got)), None)

    def repeats(self, other: Rerun) -> bool:
        """Return whether the blocks gave the same results in two runs of the graph."""
        mine, others = ([got for _, _, got in rerun.pairs] for rerun in (self, other))
        return len(mine) == len(others) and all(map(equal, mine, others))


@contextmanager
def rerunning(model: nn.Module, captured: Captured) -> Iterator[Rerun]:
    """Let a graph run its blocks once in the conditions of the recorded run.

    Attributes are restored afterwards, and the same random numbers are drawn.
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
