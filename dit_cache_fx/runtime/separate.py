"""The graph of each kind of step, compiled by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dit_cache_fx._torch import CANNOT_COMPILE, not_a_compiled_frame
from dit_cache_fx.lowering import CompiledPart, Part, Preamble, Variants, split_preamble
from dit_cache_fx.runtime.drive import Results, lasting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Separate:
    """Variants whose graphs are compiled. `preamble`: what the host runs before a computed step."""

    variants: Variants
    preamble: Preamble | None


class StepCompiler:
    """Compiles with the `options` of `torch.compile`, each graph when it is called first.

    Raises what `torch.compile` raises for options that it does not take.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        torch.compile(_nothing, **options)
        self._options = options
        self._made: WeakKeyDictionary[Variants, Separate] = WeakKeyDictionary()

    def compiled(self, variants: Variants) -> Separate:
        """The same variants, compiled."""
        made = self._made.get(variants)
        if made is None:
            preamble = split_preamble(variants.compute)
            whole = variants if preamble is None else replace(variants, compute=preamble.compute)
            made = self._made[variants] = Separate(whole.mapped(self._part), preamble)
        return made

    def _part(self, part: Part) -> Part:
        return CompiledPart(part.gm, part.names, _Whole(part.run, self._options))


class _Whole:
    """A compiled graph; where its blocks break it, and may, the blocks are compiled one by one."""

    def __init__(self, forward: Callable[..., Results], options: Mapping[str, Any]) -> None:
        self._forward = forward
        self._options = options
        self._compiled = torch.compile(forward, **{**options, "fullgraph": True})

    def __call__(self, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
        try:
            results = self._compiled(*operands)
        except CANNOT_COMPILE as error:
            if self._options.get("fullgraph"):
                raise
            log.info("no single graph for a kind of step, so its blocks one by one: %s", error)
            not_a_compiled_frame(self._forward)
            self._compiled = torch.compile(self._forward, **self._options)
            results = self._compiled(*operands)
        return lasting(results)


def _nothing() -> None:
    return None
