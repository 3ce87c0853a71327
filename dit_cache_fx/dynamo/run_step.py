"""Run the graph of a step's kind on the tensors of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dit_cache_fx.lowering import Part
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.drive import lasting
from dit_cache_fx.runtime.step import Step


def run_step(
    lowered: Lowered, step: Step, tensors: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Run the graph of the step's kind; it takes its inputs by name."""
    variants, made = lowered.variants, dict[str, torch.Tensor]()
    value: torch.Tensor | None = None
    if variants.prefix is not None:
        value, *carried = _call(lowered, variants.prefix, tensors, made)
        made.update(zip(variants.carried, carried, strict=True))
        value = lasting([value])[0]
    step.decide(value)
    part = variants.compute if step.computes else variants.reuse
    made.update(step.compiled_given(part.names))
    return _call(lowered, part, tensors, made)


def _call(
    lowered: Lowered,
    part: Part,
    tensors: Sequence[torch.Tensor],
    made: Mapping[str, torch.Tensor],
) -> Sequence[torch.Tensor]:
    places = lowered.places
    return part.run(*(tensors[places[n]] if n in places else made[n] for n in part.names))
