"""A lowered graph of which the host runs a part first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dit_cache_fx._torch import not_a_compiled_frame, unseen
from dit_cache_fx.lowering.part import Part
from dit_cache_fx.lowering.preamble import Preamble, split_preamble
from dit_cache_fx.lowering.variants import Variants


@dataclass(frozen=True)
class SplitPart(Part):
    """A lowered graph that runs in two parts: the preamble on the host, then the rest."""

    preamble: Preamble

    @property
    def run(self) -> Callable[..., Sequence[torch.Tensor]]:
        return self._run

    @not_a_compiled_frame
    def _run(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        given = unseen(_prepared)(self, operands)
        return self.preamble.rest.run(*given)


def prepared(preamble: Preamble, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a preamble on the host; return its results by name, each in its own memory."""
    with torch.no_grad():
        results = preamble.part.run(*preamble.part.operands(given))
    return {n: own_copy(t) for n, t in zip(preamble.given, results, strict=True)}


def split_variants(variants: Variants) -> Variants:
    """Return variants without the parts that a compiler cannot hold in one graph."""

    def split(part: Part) -> Part:
        preamble = split_preamble(part, variants.cached)
        return part if preamble is None else SplitPart(part.gm, part.names, preamble)

    return variants.mapped(split)


def compiled_variants(variants: Variants, function: Callable[[Part], Part]) -> Variants:
    """Apply `function` to each graph of split variants that is to be compiled."""

    def compiled(part: Part) -> Part:
        if not isinstance(part, SplitPart):
            return function(part)
        preamble = part.preamble
        return replace(part, preamble=replace(preamble, rest=function(preamble.rest)))

    return variants.mapped(compiled)


def _prepared(part: SplitPart, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the operands of the rest of a graph."""
    given = dict(zip(part.names, operands, strict=True))
    return part.preamble.rest.operands(given | prepared(part.preamble, given))


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy, in memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)
