"""Compare the first block of each list as it really runs in the model and in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from dit_cache_fx.errors import CaptureError
from dit_cache_fx.values.checksum import Checksums, checksum, equal
from dit_cache_fx.values.pytree import flatten
from dit_cache_fx.values.random_state import fixed_random_state


class Samples:
    """Checksums of block results, by name; empty if they are not `wanted`."""

    def __init__(self, wanted: bool = False) -> None:
        self.wanted = wanted
        self._taken: dict[str, Checksums] = {}

    def take(
        self,
        name: str,
        block: Callable[[Sequence[torch.Tensor]], Any],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Run the block on copies of its inputs, if it is the first of its list."""
        lists = {known.rpartition(".")[0] for known in self._taken}
        if self.wanted and name.rpartition(".")[0] not in lists:
            self._taken[name] = []  # stays empty if the block fails
            with fixed_random_state(inputs), suppress(Exception):
                outputs, _ = flatten(block([t.clone() for t in inputs]))
                self._taken[name] = [checksum(t) for t in outputs]

    def unlike(self, other: Samples) -> str | None:
        """Return the first block with another result in the other run."""
        pairs = ((name, own, other._taken.get(name, [])) for name, own in self._taken.items())
        return next((name for name, own, others in pairs if not equal(own, others)), None)


def other_block(name: str) -> CaptureError:
    """Return the error for a block that behaves differently in the graph."""
    return CaptureError(
        f"block {name} gives another result in the captured graph than in the model, for the same "
        "arguments: it reads something that the model's forward sets around it (a module-level "
        "variable, a context, an attribute of an object). Let the block take it as an argument; "
        "or make such calls between disable() and enable()"
    )
