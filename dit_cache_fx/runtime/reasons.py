"""Reasons for captures and for leaving a graph, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dit_cache_fx.capture import FlatCall
from dit_cache_fx.capture.fingerprint import Fingerprint
from dit_cache_fx.ir.nodes import tensor_spec
from dit_cache_fx.ir.program import Program
from dit_cache_fx.values.pytree import Skeleton, difference
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass(frozen=True)
class WhyCaptured:
    """The reason for a capture, as text on demand.

    `same`: the number of graphs for inputs like the call's. `newest`: of all graphs, and the
    skeleton of its call.
    """

    call: FlatCall
    same: int
    newest: tuple[Program, Skeleton] | None

    def __str__(self) -> str:
        if self.same:
            return f"none of the {self.same} graphs for such inputs fits this call"
        if self.newest is None:
            return "the first call"
        program, skeleton = self.newest
        other_value = difference(self.call.skeleton, skeleton)
        return "another signature: " + (
            "; ".join(self._unlike(program))
            or other_value
            or "torch's state has changed (autocast, attention kernels, default dtype)"
        )

    def _unlike(self, program: Program) -> list[str]:
        was = {name: tensor_spec(program.node(name)) for name in program.inputs}
        now = dict(zip(self.call.names(), map(TensorSpec.of, self.call.tensors), strict=True))
        return [
            f"{name} is {now.get(name)}, was {was.get(name)}"
            for name in dict.fromkeys((*now, *was))
            if now.get(name) != was.get(name)
        ]


def changes(changed: Iterable[tuple[str, str]], before: Fingerprint, now: Fingerprint) -> str:
    """Describe the changes of a model."""
    return "; ".join(
        f"{what} of {path.lstrip('.') or 'the model'}: {before.get((path, what))!r} -> "
        f"{now.get((path, what))!r}"
        for path, what in sorted(changed)
    )
